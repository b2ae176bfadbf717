"""A deployed model computes what the trained one does on whole codes, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config
from nipq.errors import NonFiniteError, OrderError
from nipq.nn.deployed import DeployedLayer, DeployedWeightOnlyLayer, deployed_layers
from nipq.nn.layers import is_prepared
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import layer_table, phase_of, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

Get = Callable[..., Any]


@torch.no_grad()
def test_it_equals_phase_int_to_the_bit(every: Any) -> None:
    deployed = convert(every.model)
    set_phase_(every.model, "int")
    assert torch.equal(deployed(every.inputs), every.model.eval()(every.inputs))


@torch.no_grad()
def test_it_is_close_to_the_trained_model(every: Any) -> None:
    """But for single codes that flip, as sums run in another order: most outputs agree to float rounding."""
    set_phase_(every.model, "round")
    expected, found = every.model.eval()(every.inputs), convert(every.model)(every.inputs)
    apart = (found - expected).abs() / expected.abs().max()
    assert float(apart.median()) < 1e-5
    assert float(apart.max()) < 0.1


def test_layers_hold_the_trained_codes(every: Any) -> None:
    deployed = convert(every.model)
    layers = deployed_layers(deployed)
    rows = layer_table(every.model)
    names = {module: name for name, module in every.model.named_modules()}
    assert layers.keys() == {names[row.layer] for row in rows}
    for row in rows:
        layer = layers[names[row.layer]]
        assert isinstance(layer, DeployedWeightOnlyLayer if row.input is None else DeployedLayer)
        assert layer.weight_codes.dtype == (torch.int8 if row.weight.bits_rounded <= 8 else torch.int16)
        original = row.layer.parametrizations.weight.original
        assert torch.equal(layer.weight_codes.float(), row.weight.codes(original))
        assert f"weight_bits={row.weight.bits_rounded}" in layer.extra_repr()


def test_nothing_trainable_is_left_and_the_trained_model_is_untouched(every: Any) -> None:
    before = {key: value.clone() for key, value in every.model.state_dict().items()}
    phase = phase_of(every.model)
    deployed = convert(every.model)
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert not any(is_prepared(module) or module.training for module in deployed.modules())
    assert phase_of(every.model) is phase
    for key, value in every.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_batch_norms_are_folded_where_whole_codes_are_summed(get: Get) -> None:
    folded = convert(get("mixed").model)
    assert isinstance(folded.stem_bn, nn.Identity)
    assert isinstance(folded.depthwise_bn, nn.Identity)
    assert folded.stem.batchnorm == "stem_bn"
    kept = convert(get("weights only").model)
    assert isinstance(kept.stem_bn, nn.BatchNorm2d)
    some = convert(get("float input and a float layer").model)
    assert isinstance(some.stem, DeployedWeightOnlyLayer)
    assert isinstance(some.stem_bn, nn.BatchNorm2d)
    assert isinstance(some.depthwise_bn, nn.Identity)
    assert not isinstance(some.point, (DeployedLayer, DeployedWeightOnlyLayer))


def test_a_model_in_phase_int_converts_alike(mixed: Any) -> None:
    expected = convert(mixed.model)(mixed.inputs)
    set_phase_(mixed.model, "int")
    assert torch.equal(convert(mixed.model)(mixed.inputs), expected)


def test_a_wrapped_model_converts_alike(mixed: Any) -> None:
    expected = convert(mixed.model)(mixed.inputs)
    wrapped = convert(nn.Sequential(mixed.model))
    assert torch.equal(wrapped(mixed.inputs), expected)
    assert deployed_layers(wrapped)["0.stem"].batchnorm == "0.stem_bn"


def test_tied_weights_are_one_tensor(get: Get) -> None:
    deployed = convert(get("tied").model)
    assert deployed.second.weight_codes is deployed.first.weight_codes
    assert deployed.second.tied_to == "first"
    assert deployed.again is deployed.table
    assert copy.deepcopy(deployed).second.weight_codes is not deployed.first.weight_codes


def test_a_copy_a_state_dict_and_a_change_of_type_keep_the_codes(mixed: Any) -> None:
    deployed = convert(mixed.model)
    copied = copy.deepcopy(deployed)
    expected = deployed(mixed.inputs)
    assert torch.equal(copied(mixed.inputs), expected)
    for buffer in copied.buffers():
        buffer.zero_()
    copied.load_state_dict(deployed.state_dict())
    assert torch.equal(copied(mixed.inputs), expected)
    assert copied.to(torch.float64).stem.weight_codes.dtype == deployed.stem.weight_codes.dtype


def test_half_precision_inputs_are_divided_in_float32(get: Get) -> None:
    model = get("a lone layer")
    layer = convert(model.model)
    x = model.inputs.half()
    assert torch.equal(layer(x), layer(x.float()).half())


@torch.no_grad()
def test_it_exports(mixed: Any) -> None:
    deployed = convert(mixed.model)
    program = torch.export.export(deployed, (mixed.inputs,)).module()
    assert torch.equal(program(mixed.inputs), deployed(mixed.inputs))


@torch.no_grad()
def test_it_compiles_into_one_graph(mixed: Any) -> None:
    deployed = convert(mixed.model)
    compiled = torch.compile(deployed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(mixed.inputs), deployed(mixed.inputs))


def test_a_learned_bit_width_is_refused_by_name(get: Get) -> None:
    with pytest.raises(OrderError, match=r"stem\.weight: expected a frozen bit-width"):
        convert(get("mixed", freeze=False).model)


def test_a_clipping_range_that_was_never_set_is_refused_by_name() -> None:
    config = Config(weight_bits=4, activation_bits=4)
    model = prepare_(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3), config)
    with pytest.raises(OrderError, match=r"0\.input: expected a calibrated"):
        convert(model)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(OrderError, match="expected a prepared model"):
        convert(nn.Linear(3, 2))


def test_numbers_that_are_not_finite_are_refused_by_name(get: Get) -> None:
    broken = get("mixed").model
    broken.stem_bn.running_mean[0] = float("inf")
    with pytest.raises(NonFiniteError, match="stem with its bias and batch norm: expected finite numbers"):
        convert(broken)
    broken = get("mixed").model
    with torch.no_grad():
        broken.point.parametrizations.weight.original[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"point\.weight: expected finite numbers"):
        convert(broken)


def test_a_model_that_looks_at_a_layer_sees_floats_and_its_settings() -> None:
    """Models cast to ``layer.weight.dtype`` or read ``layer.in_features``; both mean the trained layer."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x.to(self.conv.weight.dtype))).mean((2, 3))
            return self.head(x.reshape(-1, self.head.in_features).to(self.head.weight.dtype))

    x = torch.randn(4, 3, 6, 6)
    model = calibrate_(prepare_(Looking(), x, Config(granularity="channel")), [x]).eval()
    set_bits_(model, 3)
    deployed = convert(model)
    assert deployed.head.weight_codes.dtype == torch.int8
    assert deployed.conv.kernel_size == (3, 3)
    assert torch.allclose(deployed.head.weight, model.head.weight, atol=1e-6)
    set_phase_(model, "int")
    assert torch.equal(deployed(x), model(x))
    with pytest.raises(AttributeError, match="no_such_setting"):
        _ = deployed.head.no_such_setting
