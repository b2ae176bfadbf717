"""What preparing refuses or avoids is done on purpose here, past every refusal: the proof and the rehearsal find it.

Each network is deployed wrongly in one of the ways in which real models once were. E1 compares with the trained model
in phase "round", which shares no forward with the deployed layers, and names the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nipq
from nipq.errors import NotQuantizableError
from nipq.nn.layers import quantization
from nipq.prepare import prepare, rehearsal
from nipq.prepare.layer_table import layer_table, set_phase_
from tests.verify.planting import checks, first

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Masked(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5) * 1.3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.mask, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Rectified(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


class Residual(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1, 1:-1, 1:-1] + super().forward(x)


class Gained(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Equalised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * 0.3, self.bias)


class Normed(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(x))
        return y


class Net(nn.Module):
    """A convolution, one to be judged, and a head."""

    def __init__(self, judged: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3), judged(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(functional.relu(self.stem(x))))
        return self.head(functional.relu(y)).mean((2, 3))


class Decoder(Net):
    """Another operation reads the weight behind which a batch norm stands."""

    def forward(self, x: Tensor) -> Any:
        y = functional.relu(self.norm(self.conv(functional.relu(self.stem(x)))))
        return self.head(functional.conv_transpose2d(y, self.conv.weight)).mean((2, 3))


class Written(Net):
    """Something writes into a convolution's output before the batch norm reads it."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(functional.relu(self.stem(x)))
        y[..., :2] = 0
        return self.head(functional.relu(self.norm(y))).mean((2, 3))


@dataclass
class Result:
    logits: Tensor
    early: Tensor


class Returned(Net):
    """A convolution's output is a result of the model, in an object."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(functional.relu(self.stem(x)))
        return Result(self.head(functional.relu(self.norm(y))).mean((2, 3)), y)


class Listed(Net):
    """A list holds the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv]

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.layers[0](functional.relu(self.stem(x))))
        return self.head(functional.relu(y)).mean((2, 3))


@pytest.fixture
def unrefused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused: neither what the probe finds nor what the rehearsal does."""
    monkeypatch.setattr("nipq.prepare.findings.form_of_layer", lambda *_args: ("linear", None), raising=False)
    monkeypatch.setattr(prepare, "rehearse", lambda *_args: None)


def trained(model: nn.Module, wrong: Callable[[nn.Module], None]) -> nn.Module:
    """Prepared, with one wrong fact about it, calibrated and frozen."""
    torch.manual_seed(0)
    nipq.prepare_(model, X)
    wrong(model)
    nipq.calibrate_(model, [X])
    nipq.reestimate_bn_(model, [X])
    nipq.freeze_bits_(model, nipq.AverageBits(weights=6, activations=6))
    set_phase_(model, "round")
    return model.eval()


def said(form: str, batchnorm: str | None) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        record = quantization(model.conv)  # type: ignore[arg-type]
        record.spec = replace(record.spec, form=form, batchnorm=batchnorm)  # type: ignore[arg-type]

    return change


#: Kept layers said to be linear: they run on whole codes, one multiply and one add.
KEPT = [Masked, Rectified, Residual, Gained, Equalised]


@torch.no_grad()
@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize("kind", KEPT)
def test_a_forward_that_does_more_on_whole_codes(kind: type[nn.Conv2d]) -> None:
    model = trained(Net(kind), said("linear", None))
    result = nipq.verify(model, nipq.convert(model), loader=[X])
    assert not checks(result)["E1"]
    assert first(result, "E1").startswith("conv: ")


@torch.no_grad()
@pytest.mark.usefixtures("unrefused")
@pytest.mark.parametrize("kind", [Decoder, Written, Returned])
def test_a_batch_norm_folded_where_something_else_reads_or_writes(kind: type[Net]) -> None:
    model = trained(kind(), said("plain", "norm"))
    result = nipq.verify(model, nipq.convert(model), loader=[X])
    assert not checks(result)["E1"]
    assert "conv" in first(result, "E1") or kind is Returned  # a decoder's: "something else reads the weight of conv"
    if kind is Returned:  # all layers agree; what the model returns beside its logits does not
        assert first(result, "E1").startswith("the model's results: ")


@torch.no_grad()
@pytest.mark.usefixtures("unrefused")
def test_a_trained_layer_that_a_list_still_holds() -> None:
    model = trained(Listed(), said("plain", "norm"))
    deployed = nipq.convert(model)
    deployed.layers = [model.conv]
    result = nipq.verify(model, deployed, loader=[X])
    assert not checks(result)["E1"]
    assert first(result, "E1").startswith("conv: called differently often")
    model.layers = _Shared([model.conv])
    with pytest.raises(NotQuantizableError, match=r"conv: expected a deployed copy that runs its own layers"):
        nipq.convert(model, X)


class _Shared(list[nn.Module]):
    """A list that copies share."""

    def __deepcopy__(self, _memo: object) -> _Shared:
        return self


@torch.no_grad()
@pytest.mark.parametrize("kind", [Decoder, Written, Returned])
def test_the_rehearsal_refuses_the_same_before_training(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "rehearse", lambda *_args: None)
    model = kind()
    nipq.prepare_(model, X)
    said("plain", "norm")(model)
    with pytest.raises(NotQuantizableError, match="expected a model whose deployed form computes what is trained"):
        rehearsal.rehearse(model, X)


@torch.no_grad()
def test_the_right_deployments_of_the_same_networks_pass() -> None:
    for build in (*(lambda kind=kind: Net(kind) for kind in (*KEPT, Normed)), Decoder, Written, Returned, Listed):
        model = trained(build(), lambda _model: None)
        assert nipq.verify(model, nipq.convert(model, X), loader=[X]), build
        assert [row.name for row in layer_table(model)] == ["stem", "conv", "head"]


@pytest.mark.parametrize("kind", [Standardised])
def test_a_function_of_the_weight_is_refused(kind: type[nn.Conv2d]) -> None:
    with pytest.raises(NotQuantizableError, match=r"conv: .*Rule\('conv', quantize=False\)"):
        nipq.prepare_(Net(kind), X)
