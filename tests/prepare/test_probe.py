"""Layers with a forward of their own: the operation and a bias, the operation and more, or refused; by trying."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nipq.config import Config, Rule
from nipq.nn.layers import LayerSpec
from nipq.prepare.findings import checked_trace
from nipq.prepare.probe import Call, Probe, has_own_forward, probe
from nipq.prepare.trace import trace
from nipq.prepare.validate import validate

X = torch.randn(2, 4, 6, 6)
_conv = nn.Conv2d.forward


def tried(layer: nn.Module, *args: Any, **kwargs: Any) -> Probe:
    """The result of a test; layer, numbers of the generators and arguments stay as they were."""
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in layer.state_dict().items()}
    given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    mode = [module.training for module in layer.modules()]
    found = probe(layer, Call(args, kwargs))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert all(not isinstance(arg, Tensor) or torch.equal(arg, old) for arg, old in zip(args, given, strict=True))
    assert [module.training for module in layer.modules()] == mode
    return found


def conv(forward: Callable[..., Any], **members: Any) -> nn.Module:
    return type("Own", (nn.Conv2d,), {"forward": forward, **members})(4, 4, 3, padding=1)


class Masked(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(1.0))  # 1 today, another number after training

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Normed(nn.Conv2d):
    """As detectron2's wrapper."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.norm, self.activation = nn.BatchNorm2d(4), functional.relu

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.activation(self.norm(x))


KEPT = {
    "mask": Masked(),
    "gain": Scaled(),
    "norm and activation": Normed(),
    "relu": conv(lambda s, x: functional.relu(_conv(s, x))),
    "clamp that normal values do not reach": conv(lambda s, x: _conv(s, x).clamp(max=300)),
    "residual": conv(lambda s, x: x + _conv(s, x)),
    "scaled weight": conv(lambda s, x: functional.conv2d(x, s.weight * 0.3, s.bias, padding=1)),
    "scaled input": conv(lambda s, x: _conv(s, x * 0.5)),
    "scaled output": conv(lambda s, x: _conv(s, x) * 2),
    "constant added": conv(lambda s, x: _conv(s, x) + 1),
    "bias twice": conv(lambda s, x: _conv(s, x) + s.bias.view(-1, 1, 1)),
    "cannot do without a bias": conv(lambda s, x: functional.conv2d(x, s.weight) + s.bias.view(-1, 1, 1)),
    "channels in another order": conv(lambda s, x: functional.conv2d(x, s.weight.flip(0), s.bias, padding=1)),
    "channels on another axis": conv(lambda s, x: _conv(s, x.transpose(2, 3)).transpose(1, 2)),
    "other statistics of the weight": conv(lambda s, x: _conv(s, x) + s.weight.mean()),
}

LINEAR = {
    "the same": conv(lambda s, x: _conv(s, x)),
    "padding": conv(lambda s, x: functional.conv2d(functional.pad(x, (1, 1)), s.weight, s.bias)),
    "a part of the output": conv(lambda s, x: _conv(s, x)[..., :-1]),
    "spatial axes swapped and back": conv(lambda s, x: _conv(s, x.transpose(2, 3)).transpose(2, 3)),
    "dropout of training": conv(lambda s, x: functional.dropout(_conv(s, x), 0.5, s.training)),
    "own padding in _conv_forward": conv(
        _conv, _conv_forward=lambda s, x, w, b: functional.conv2d(functional.pad(x, (2, 2)), w, b)
    ),
}


class Counter(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return super().forward(x)


class Drifting(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(1)
        return super().forward(x)


def standardised(layer: nn.Module, x: Tensor) -> Tensor:
    weight = layer.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    return functional.conv2d(x, weight, layer.bias)


REFUSED = {
    "weight standardisation": (conv(standardised), "another weight"),
    "a mean taken off in _conv_forward": (
        conv(_conv, _conv_forward=lambda s, x, w, b: functional.conv2d(x, w - w.mean(), b)),
        "another weight",
    ),
    "tanh of the weight": (conv(lambda s, x: functional.conv2d(x, torch.tanh(s.weight))), "another weight"),
    "size of the weight": (conv(lambda s, x: functional.conv2d(x, s.weight.abs())), "another weight"),
    "clamp of the weight": (conv(lambda s, x: functional.conv2d(x, s.weight.clamp(-9, 9))), "another weight"),
    "two kernels added": (
        conv(lambda s, x: functional.conv2d(x, s.weight + s.weight.flip(-1))),
        "another weight",
    ),
    "a factor for each element": (
        conv(lambda s, x: functional.conv2d(x, s.weight * torch.linspace(1, 2, 9).view(3, 3).to(s.weight))),
        "another weight",
    ),
    "norm in front": (conv(lambda s, x: _conv(s, functional.normalize(x))), "changes its input"),
    "activation in front": (conv(lambda s, x: _conv(s, functional.relu(x))), "changes its input"),
    "clamp in front": (conv(lambda s, x: _conv(s, x.clamp(-9, 9))), "changes its input"),
    "padding with ones": (conv(lambda s, x: _conv(s, functional.pad(x, (1, 1), value=1.0))), "changes its input"),
    "twice": (conv(lambda s, x: _conv(s, x) + _conv(s, 2 * x)), "2 times, not once"),
    "never": (conv(lambda s, x: x), "0 times, not once"),
    "another input": (conv(lambda s, x, y: _conv(s, y)), "0 times, not once"),
    "two results": (conv(lambda s, x: (_conv(s, x), x)), "returns a tuple, not one tensor"),
    "random": (conv(lambda s, x: _conv(s, x) + torch.rand(1)), "draws random numbers"),
    "counter": (Counter(4, 4, 3), "counters"),
    "running buffer": (Drifting(), "changes its buffers"),
    "written into": (conv(lambda s, x: (s.weight.data.clamp_(-0.2, 0.2), _conv(s, x))[1]), "writes into its weight"),
    "no parameter any more": (conv(lambda s, x: functional.conv2d(x, s._parameters["weight"])), "KeyError: 'weight'"),
    "failing": (conv(lambda s, x: _conv(s, x) if (x[:, 0] == X[:, 0]).all() else 1 / 0), "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_forward_that_does_more_is_kept(case: str) -> None:
    assert tried(KEPT[case], X) == Probe("kept")


@pytest.mark.parametrize("case", LINEAR)
def test_a_forward_that_does_no_more_is_linear(case: str) -> None:
    found = tried(LINEAR[case], X)
    assert found.form == "linear"
    assert found.uses == (6 / 5 if case == "a part of the output" else 1)  # it computes six columns to give five


@pytest.mark.parametrize("case", REFUSED)
def test_a_forward_that_codes_do_not_go_through_is_refused(case: str) -> None:
    layer, reason = REFUSED[case]
    found = tried(layer, *([X, X] if case == "another input" else [X]))
    assert found.form is None
    assert reason in found.problem


def test_the_kinds_own_forward_needs_no_test() -> None:
    assert not any(
        has_own_forward(layer)
        for layer in (
            nn.Conv2d(1, 1, 1),
            nn.ConvTranspose1d(1, 1, 1),
            nn.Embedding(2, 2),
            nn.MultiheadAttention(2, 1).out_proj,
            type("Renamed", (nn.Linear,), {})(1, 1),
        )
    )
    assert all(has_own_forward(layer) for layer in (*KEPT.values(), *LINEAR.values()))


def test_a_forward_replaced_on_the_layer_itself_is_not_even_run() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    assert has_own_forward(layer)
    assert probe(layer, Call((torch.zeros(1, 4),), {})).problem == "the forward of this very layer was replaced"


def test_the_first_argument_has_to_be_floats() -> None:
    layer = conv(lambda s, n, x: _conv(s, x))
    assert "first argument is no tensor of floats" in tried(layer, 3, X).problem
    assert tried(conv(lambda s, *, x: _conv(s, x)), x=X).form == "linear"


def test_other_types_of_float_are_tested_in_their_own_type_where_double_fails() -> None:
    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        return functional.conv2d(x.float(), layer.weight, layer.bias)

    assert tried(conv(forward), X).form == "linear"
    assert tried(conv(lambda s, x: _conv(s, x.float().relu())), X).form is None


def test_transposed_and_grouped_layers() -> None:
    def own(kind: type[nn.Module], forward: Callable[..., Any], *settings: Any, **more: Any) -> nn.Module:
        return type("Own", (kind,), {"forward": forward})(*settings, **more)

    transposed = own(nn.ConvTranspose2d, lambda s, x: nn.ConvTranspose2d.forward(s, x), 4, 6, 2, stride=2, groups=2)
    assert tried(transposed, X).form == "linear"
    assert tried(own(nn.Conv2d, lambda s, x: _conv(s, x), 4, 6, 3, groups=2), X).form == "linear"
    product = own(nn.Linear, lambda s, x: x @ s.weight.T + s.bias, 4, 6)
    assert tried(product, torch.randn(3, 4)).form == "kept"  # it cannot do without its bias


# ---------------------------------------------------------------------- layers of libraries


def of_library(module: str, name: str) -> type[nn.Module]:
    pytest.importorskip(module.partition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found


@pytest.mark.parametrize(
    ("name", "form"),
    [("Conv2dSame", "linear"), ("StdConv2d", None), ("ScaledStdConv2d", None), ("ScaledStdConv2dSame", None)],
)
def test_convolutions_of_timm(name: str, form: str | None) -> None:
    assert tried(of_library("timm.layers", name)(4, 4, 3, stride=2), X).form == form


IDS = torch.tensor([[3, 1, 2]])


@pytest.mark.parametrize(
    ("model", "name", "settings", "args", "form"),
    [
        ("opt", "OPTLearnedPositionalEmbedding", (9, 4), (torch.ones_like(IDS), 0), "kept"),
        ("bart", "BartLearnedPositionalEmbedding", (9, 4), (IDS, 0), "kept"),
        ("bart", "BartScaledWordEmbedding", (9, 4, 1, 3.0), (IDS,), "kept"),
        ("gemma", "GemmaTextScaledWordEmbedding", (9, 4, 1, 3.0), (IDS,), "kept"),
        ("whisper", "WhisperPositionalEmbedding", (9, 4), (IDS,), "kept"),
        ("pegasus", "PegasusSinusoidalPositionalEmbedding", (9, 4), (torch.Size([1, 3]),), None),  # no tensor
        ("idefics", "IdeficsDecoupledEmbedding", (9, 2, 4), (IDS,), "kept"),
        ("falcon", "FalconLinear", (4, 6), (torch.randn(2, 3, 4),), "linear"),
        ("perceiver", "Conv2dSamePadding", (4, 8, 3), (X,), "linear"),
        ("lasr", "LasrEncoderCTCHead", (4, 8, 1), (torch.randn(2, 5, 4),), "kept"),  # channels last
    ],
)
def test_layers_of_transformers(model: str, name: str, settings: Any, args: Any, form: str | None) -> None:
    layer = of_library(f"transformers.models.{model}.modeling_{model}", name)(*settings)
    assert tried(layer, *args).form == form


def test_a_large_table_takes_little_memory() -> None:
    class Long(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    with torch.device("meta"):
        table = Long(2**26, 16)
    table.weight = nn.Parameter(torch.zeros(1, 16).expand(2**26, 16), requires_grad=False)  # 4 GB if written out
    assert tried_without_state(table).form == "kept"


def tried_without_state(table: nn.Module) -> Probe:
    return probe(table, Call((IDS,), {}))


# ---------------------------------------------------------------------- in a model


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.own, self.bn, self.head = layer, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.own(x)))


def specs(model: nn.Module, config: Config | None = None) -> dict[str, LayerSpec]:
    return {spec.name: spec for spec in checked_trace(model, X, config or Config()).layers}


def test_the_batch_norm_stays_behind_a_kept_layer_and_is_folded_into_a_linear_one() -> None:
    kept, linear = Net(Masked()), Net(conv(lambda s, x: _conv(s, x)))
    assert (specs(kept)["own"].form, specs(kept)["own"].batchnorm) == ("kept", None)
    assert (specs(linear)["own"].form, specs(linear)["own"].batchnorm) == ("linear", "bn")
    assert (specs(linear)["head"].form, specs(linear)["own"].macs) == ("plain", 4 * 4 * 9 * 36)
    floats = [found.reason for found in validate(kept, X) if found.name == "bn"]
    assert floats[0].startswith("batch_norm: normalisation stays float")
    assert not [found for found in validate(linear, X) if found.name == "bn"]


def test_multiplications_of_a_layer_that_pools_inside_are_those_before() -> None:
    layer = conv(lambda s, x: functional.max_pool2d(_conv(s, x), 2))
    assert specs(Net(layer))["own"].macs == 4 * 4 * 9 * 36


def test_refusals_name_layer_class_reason_and_rule_and_the_rule_helps() -> None:
    model = Net(conv(standardised))
    (found,) = [found for found in validate(model, X) if found.severity == "error"]
    assert found.name == "own"
    assert found.reason.startswith("Own has a forward of its own that cannot be quantized: its own forward computes")
    assert found.remedy == "Leave it float with Rule('own', quantize=False)."
    assert specs(model, Config(rules=[Rule("own", quantize=False)]))["own"].form == "plain"


def test_a_layer_that_a_rule_leaves_float_is_not_tested() -> None:
    calls: list[int] = []
    model = Net(conv(lambda s, x: calls.append(1) or _conv(s, x)))
    trace(model, X)
    once = len(calls)
    specs(model, Config(rules=[Rule("own", quantize=False)]))
    assert len(calls) == 2 * once
