"""Training leaves a ReLU out where nobody can tell, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.kernels.cpu import library
from nipq.nn.layers import quantization
from nipq.nn.relu import cap_of, neighbours
from nipq.prepare.layer_table import set_noise_mix_, set_phase_

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


def stack(relu: type[nn.Module], *, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), relu(inplace)),
        nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), relu(inplace), nn.Flatten(), nn.Linear(8 * 16, 4)),
    )


def prepared(model: nn.Module, config: nipq.Config | None = None) -> nn.Module:
    x = 6 * torch.randn(16, 3, 8, 8)
    nipq.prepare_(model, x, config)
    nipq.calibrate_(model, [(x, torch.zeros(16))])
    return model.train()


def folded(model: nn.Module) -> list[str]:
    return [row.name for row in nipq.prepare.layer_table.layer_table(model) if quantization(row.layer).relu]


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    y = model(x)
    y.square().sum().backward()
    found = [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("phase", ["noise", "round"])
@pytest.mark.parametrize("noise", ["uniform", "empirical"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6])
def test_values_and_gradients_are_those_with_the_relu(
    relu: type[nn.Module], inplace: bool, noise: str, phase: str
) -> None:
    model = prepared(stack(relu, inplace=inplace), nipq.Config(noise=noise))
    set_phase_(model, phase)
    assert folded(model) == ["1.0.0"]  # the linear layer reads what Flatten has made
    x, passed = 6 * torch.randn(16, 3, 8, 8), []
    quantizer = quantization(model.get_submodule("1.0.0")).input
    quantizer.register_forward_pre_hook(lambda _module, args: passed.append(args[0].detach().min().item()))
    without = outcome(model, x)
    handle = model[0][2].register_forward_hook(lambda *_: None)  # somebody looks at the ReLU: it runs
    with_relu = outcome(model, x)
    handle.remove()
    assert passed[0] < 0 == passed[1]
    for ours, theirs in zip(without, with_relu, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_nothing_of_the_relu_is_kept() -> None:
    model = prepared(stack(nn.ReLU6))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(16, 3, 8, 8))
    assert sum(t.shape == (16, 8, 6, 6) for t in {t.data_ptr(): t for t in kept}.values()) == 2  # of BN, of the layer


@pytest.mark.parametrize("case", ["eval", "float phase", "signed grid", "uncalibrated", "tempered", "other method"])
def test_the_relu_runs_wherever_the_quantizer_does_not_take_its_place(case: str) -> None:
    config = nipq.Config(method="lsq", weight_bits=4, activation_bits=4) if case == "other method" else None
    model = prepared(stack(nn.ReLU), config)
    quantizer = quantization(model.get_submodule("1.0.0")).input
    x = torch.randn(4, 8, 6, 6)
    assert quantizer.replaces_relu(x) is (case != "other method")
    match case:
        case "eval":
            model.eval()
        case "float phase":
            set_phase_(model, "float")
        case "signed grid":
            quantizer.grid = nipq.functional.SIGNED
        case "uncalibrated":
            quantizer.calibrated = False
        case "tempered":
            set_noise_mix_(model, 0.5)
    assert not quantizer.replaces_relu(x)
    relu = model[0][2]
    assert torch.equal(relu(x), x.relu())


class Auxiliary(nn.Module):
    """Reads the ReLU a second time, but only while training: no trace of an evaluation sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        return self.second(x) + (x.sum() if self.training else 0)


class Twice(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x + 1


@pytest.mark.parametrize(
    "model",
    [
        Auxiliary(),
        Twice(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    ],
    ids=["a second reader", "another forward", "another function", "something in between", "nothing behind"],
)
def test_a_relu_that_may_have_another_reader_stays(model: nn.Module) -> None:
    nipq.prepare_(model, torch.randn(2, 4))
    assert folded(model) == []


class OfTraining(nn.Module):
    """A second reader that only training has, reached in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.auxiliary = how, nn.Linear(4, 2)
        self.features = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.how == "iterates":
            for layer in self.features:
                x = layer(x)
                if self.training and isinstance(layer, nn.ReLU):
                    self.kept.append(x)
            return x
        if self.how == "two slices":
            middle = self.features[:2](x)
            return self.features[2:](middle)
        y = self.features(x)
        if not self.training or self.how == "no other":
            return y
        match self.how:
            case "slice":
                return y, self.auxiliary(self.features[:2](x))
            case "by hand":
                return y, self.auxiliary(self.features[1].forward(x))
            case "fails":
                raise ValueError("training wants targets")
        return y


@pytest.mark.parametrize("how", ["no other", "iterates", "two slices", "slice", "by hand", "fails"])
def test_a_relu_stays_unless_training_reads_it_in_its_layer_alone(how: str) -> None:
    torch.manual_seed(3)
    model, numbers = OfTraining(how), torch.get_rng_state()
    nipq.prepare_(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert folded(model) == (["features.2"] if how == "no other" else [])
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.kept == []  # training was tried on a copy


def test_a_relu_that_a_hook_reads_runs_wherever_the_hook_is() -> None:
    x, seen = torch.randn(4, 8, 6, 6), []

    def see(*_: object) -> None:
        seen.append(1)

    model = prepared(stack(nn.ReLU))
    relu = model[0][2]
    assert torch.equal(relu(x), x)
    for register in (
        model[0].register_forward_hook,  # ends with it
        model[1][0].register_forward_pre_hook,  # is given its result
        model[1].register_forward_pre_hook,
        model[1][0][0].register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(see)
        assert torch.equal(relu(x), x.relu())
        handle.remove()
        assert torch.equal(relu(x), x)


def test_running_statistics_and_buffers_stay_though_training_is_tried() -> None:
    model = stack(nn.ReLU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nipq.prepare_(model, torch.randn(1, 3, 8, 8))  # a batch of one is enough
    assert folded(model) == ["1.0.0"]
    nipq.restore_(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_relu_that_runs_twice_stays() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4))
    nipq.prepare_(model, torch.randn(2, 4))
    assert folded(model) == []


def test_copies_fold_for_themselves_and_restoring_puts_the_relu_back() -> None:
    model = prepared(stack(nn.ReLU))
    twin = copy.deepcopy(model)
    quantization(twin.get_submodule("1.0.0")).input.calibrated = False
    x = torch.randn(4, 8, 6, 6)
    assert torch.equal(twin[0][2](x), x.relu())
    assert torch.equal(model[0][2](x), x)
    nipq.restore_(model)
    assert torch.equal(model[0][2](x), x.relu())
    assert set(vars(model[0][2])) == set(vars(nn.ReLU()))


def test_a_deployed_model_has_plain_relus() -> None:
    model = prepared(stack(nn.ReLU6))
    nipq.freeze_bits_(model)
    assert "forward" not in vars(nipq.convert(model)[0][2])


def test_which_modules_are_relus() -> None:
    class Mine(nn.ReLU):
        pass

    assert (cap_of(nn.ReLU()), cap_of(nn.ReLU6())) == (float("inf"), 6.0)
    assert cap_of(Mine()) is None
    assert cap_of(nn.Hardtanh(0, 6)) is None


def test_a_row_of_modules_is_followed_through_nested_containers() -> None:
    model = stack(nn.ReLU)
    assert neighbours(model, "0.2", "1.0.0")
    assert not neighbours(model, "0.2", "1.3")
    assert not neighbours(model, "1.3", "0.0")
    assert not neighbours(nn.Sequential(nn.ReLU(), nn.Sequential()), "0", "1")
