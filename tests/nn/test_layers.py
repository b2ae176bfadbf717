from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nipq.config import Config, Rule
from nipq.errors import OrderError
from nipq.functional.grid import SIGNED
from nipq.functional.uniform import quantize
from nipq.nn.kinds import is_supported, output_channel_axis
from nipq.nn.layers import is_prepared, plain_shell, quantization, weight_quantizer
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.prepare.prepare import prepare_, restore_
from nipq.qat.calibrate import calibrate_
from tests.nn.gpt2 import Conv1D

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (nn.Linear(6, 4), (2, 7, 6)),
    "GPT-2's linear": (Conv1D(4, 6), (2, 7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d grouped, dilated, strided": (nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2, bias=False), (2, 4, 9, 9)),
    "conv2d reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "conv2d same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, 2), (2, 4, 5)),
    "transposed 2d, grouped": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, 2, bias=False), (1, 2, 3, 4, 5)),
}


def prepared(name: str, config: Config | None = None) -> tuple[nn.Module, Tensor]:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    model = prepare_(nn.Sequential(copy.deepcopy(layer)), x, config or Config(input_bits=6))
    return calibrate_(model, [x]), x


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_on_its_quantized_weight_and_input(name: str) -> None:
    model, x = prepared(name)
    float_layer, layer = LAYERS[name][0], model[0]
    assert type(layer).__mro__[1] is type(float_layer)
    model.eval()
    twin = copy.deepcopy(float_layer)
    with torch.no_grad():
        twin.weight.copy_(quantize(float_layer.weight, weight_quantizer(layer).alpha, 5.0, SIGNED))
        expected = twin(quantization(layer).input(x))
    assert torch.equal(model(x), expected)
    assert not torch.equal(expected, float_layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_integer_domain_gives_the_same_values(name: str) -> None:
    model, x = prepared(name)
    expected = model.eval()(x).detach()
    set_phase_(model, "int")
    found = model(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not found.requires_grad
    set_phase_(model, "round")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if "grouped" not in name or "transposed" not in name])
def test_boundaries_per_channel_follow_the_output_channels(name: str) -> None:
    model, x = prepared(name, Config(granularity="channel", init="max", weight_bits=4, input_bits=6))
    layer, float_layer = model[0], LAYERS[name][0]
    axis = output_channel_axis(layer)
    rows = float_layer.weight.detach().movedim(axis, 0).flatten(1)
    torch.testing.assert_close(weight_quantizer(layer).alpha.detach(), rows.abs().amax(dim=1))
    expected = model.eval()(x).detach()
    set_phase_(model, "int")
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_training_leaves_the_stored_weight_alone() -> None:
    model, x = prepared("conv1d")
    stored = model[0].parametrizations.weight.original
    before = stored.detach().clone()
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    model.eval()(x)
    assert torch.equal(stored, before)


def test_assigning_a_weight_replaces_the_float_weight() -> None:
    model, _ = prepared("linear")
    new = torch.randn(4, 6)
    model[0].weight = new
    assert torch.equal(model[0].parametrizations.weight.original, new)


class KeywordNet(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.first = nn.Linear(3, 4) if name == "input" else RenamedLinear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(**{self.name: x})


class RenamedLinear(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(features, self.weight, self.bias)


@pytest.mark.parametrize("name", ["input", "features"])
def test_an_input_given_by_keyword_is_quantized(name: str) -> None:
    x = torch.randn(4, 3)
    model = calibrate_(prepare_(KeywordNet(name), x, Config(input_bits=2)), [x]).eval()
    row = layer_table(model)[0]
    assert torch.equal(model(x), functional.linear(row.input(x), row.layer.weight, row.layer.bias))
    assert len(row.input.codes(x).unique()) <= 3


class Upsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(8, 8))


def test_further_arguments_reach_the_layer_in_every_phase() -> None:
    x = torch.randn(2, 2, 4, 4)
    model = calibrate_(prepare_(Upsampler(), x), [x]).eval()
    expected = model(x).detach()
    assert expected.shape[-2:] == (8, 8)
    set_phase_(model, "int")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_padded_zero_is_a_level_of_a_shifted_grid() -> None:
    x = functional.hardswish(2 * torch.randn(2, 2, 6, 6))
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False))
    model = prepare_(plain, x, Config(rules=[Rule("0", activation_bits=4, grid="shifted")])).eval()
    quantizer = calibrate_(model, [x])[0].quantization.input
    assert quantizer.zero_point().item() > 0
    assert quantizer(torch.zeros(1)).item() == 0
    padded_first = functional.conv2d(quantizer(functional.pad(x, (1, 1, 1, 1))), model[0].weight)
    torch.testing.assert_close(model(x), padded_first)


def test_autocast_computes_forward_and_backward() -> None:
    model, x = prepared("conv1d")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_integer_domain_ignores_autocast() -> None:
    model, x = prepared("conv1d")
    set_phase_(model.eval(), "int")
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


def test_the_integer_domain_is_for_evaluation() -> None:
    model, x = prepared("linear")
    set_phase_(model.train(), "int")
    with pytest.raises(OrderError, match=r'^0: expected evaluation mode in phase "int"'):
        model(x)


# ---------------------------------------------------------------------- checkpoints


def test_a_float_checkpoint_loads_strictly_and_leaves_the_quantizers_alone() -> None:
    model, _ = prepared("conv1d")
    alpha = weight_quantizer(model[0]).alpha.detach().clone()
    float_state = {f"0.{key}": value + 1 for key, value in LAYERS["conv1d"][0].state_dict().items()}
    model.load_state_dict(float_state, strict=True)
    assert torch.equal(model[0].parametrizations.weight.original, float_state["0.weight"])
    assert torch.equal(model[0].bias, float_state["0.bias"])
    assert torch.equal(weight_quantizer(model[0]).alpha, alpha)
    assert set(float_state) == {"0.weight", "0.bias"}  # the caller's dict is not touched


def test_a_float_checkpoint_of_another_shape_is_refused() -> None:
    model, _ = prepared("conv1d")
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.zeros(1), "0.bias": torch.zeros(6)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.bias": torch.zeros(6)})


# ---------------------------------------------------------------------- taking off


@pytest.mark.parametrize("phase", ["noise", "int"])
@pytest.mark.parametrize("name", LAYERS)
def test_detaching_gives_the_very_layer_back(name: str, phase: str) -> None:
    model, x = prepared(name)
    float_layer = LAYERS[name][0]
    parameter = model[0].parametrizations.weight.original
    set_phase_(model, phase)
    layer = restore_(model)[0]
    assert type(layer) is type(float_layer)
    assert layer.weight is parameter
    assert list(layer.state_dict()) == list(float_layer.state_dict())
    assert torch.equal(layer(x), float_layer(x))
    assert not is_prepared(layer)
    fresh = {key: value for key, value in float_layer.__dict__.items() if not key.startswith("_")}
    assert {key: value for key, value in layer.__dict__.items() if not key.startswith("_")} == fresh
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks"):
        assert not getattr(layer, hooks), hooks


def test_other_hooks_of_a_layer_survive() -> None:
    layer, shape = copy.deepcopy(LAYERS["linear"][0]), LAYERS["linear"][1]
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("mine"))
    restore_(prepare_(nn.Sequential(layer), torch.randn(shape)))
    seen.clear()
    layer(torch.randn(shape))
    assert seen == ["mine"]


def test_the_shell_keeps_settings_but_no_weights() -> None:
    layer = nn.Conv2d(2, 4, 3, stride=2, groups=2)
    shell = plain_shell(layer)
    assert type(shell) is nn.Conv2d
    assert (shell.stride, shell.groups, shell.bias) == ((2, 2), 2, None)
    assert shell._buffers["weight"] is None


def test_channel_axes() -> None:
    axes = {kind: output_channel_axis(layer) for kind, (layer, _) in LAYERS.items()}
    assert axes["transposed 1d"] == axes["transposed 3d"] == axes.pop("GPT-2's linear") == 1
    assert axes["transposed 2d, grouped"] is None
    assert {axis for kind, axis in axes.items() if "transposed" not in kind} == {0}
    assert all(is_supported(layer) for layer, _ in LAYERS.values())
