"""Attaching and taking off: what ``docs/internals/design.md`` section 5 promises of a prepared model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nipq.config import BitRange, Config, Rule
from nipq.errors import ConfigError, NotQuantizableError, OrderError
from nipq.nn.estimators import NoiseProxy
from nipq.prepare.layer_table import layer_table, quantizers, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_, restore_
from nipq.prepare.validate import validate
from nipq.qat.calibrate import calibrate_

LAYERS = ["stem", "depthwise", "squeeze", "excite", "head"]
Build = Callable[[], nn.Module]


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 8, 8)


@pytest.fixture
def model(small_net: Build, x: Tensor) -> nn.Module:
    return calibrate_(prepare_(small_net(), x), [x])


# ---------------------------------------------------------------------- invariants


def test_prepare_returns_the_model_itself_with_its_classes(small_net: Build, x: Tensor) -> None:
    plain = small_net()
    kind = type(plain)
    assert prepare_(plain, x) is plain
    assert type(plain) is kind
    assert [row.name for row in layer_table(plain)] == LAYERS
    assert not any(module.training for module in plain.modules())  # the quantizers follow their layers
    assert all(module.training for module in prepare_(small_net().train(), x).modules())


def test_training_forwards_differ_evaluations_agree_and_weights_stay(model: nn.Module, x: Tensor) -> None:
    stored = [row.layer.parametrizations.weight.original for row in layer_table(model)]
    before = [weight.detach().clone() for weight in stored]
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(weight, value) for weight, value in zip(stored, before, strict=True))


@pytest.mark.parametrize("phase", ["float", "noise", "round", "int"])
def test_restore_gives_the_model_back_bit_for_bit(small_net: Build, x: Tensor, phase: str) -> None:
    plain = small_net()
    expected, state = plain(x), {key: value.clone() for key, value in plain.state_dict().items()}
    prepared = calibrate_(prepare_(copy.deepcopy(plain), x), [x])
    set_phase_(prepared, phase)
    prepared(x)
    restored = restore_(prepared)
    assert list(restored.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in restored.state_dict().items())
    assert [name for name, _ in restored.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in restored.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(restored(x), expected)


def test_phase_float_is_the_float_model_bit_for_bit(small_net: Build, x: Tensor) -> None:
    plain = small_net()
    prepared = prepare_(copy.deepcopy(plain), x)
    set_phase_(prepared, "float")
    assert torch.equal(prepared(x), plain(x))
    assert torch.equal(prepared.train()(x), plain.train()(x))


@pytest.mark.parametrize("noise", ["uniform", "empirical"])
def test_every_quantizer_parameter_gets_a_gradient_in_one_noise_step(small_net: Build, x: Tensor, noise: str) -> None:
    prepared = calibrate_(prepare_(small_net(), x, Config(noise=noise, learn_input_range=True)), [x]).train()
    functional.cross_entropy(prepared(x), torch.arange(4)).backward()
    learned = [(q.name, name, p) for q in quantizers(prepared) for name, p in q.named_parameters()]
    assert len(learned) == 2 * (2 * len(LAYERS)) - 1  # the model's input has no learned bit-width
    for tensor, name, parameter in learned:
        assert parameter.grad is not None, (tensor, name)
        assert torch.isfinite(parameter.grad).all(), (tensor, name)
        assert parameter.grad.abs().sum() > 0, (tensor, name)


@pytest.mark.parametrize(
    ("settings", "learned"),
    [
        ({}, False),
        ({"learn_input_range": True}, True),
        ({"input_bits": 4}, True),
        ({"input_bits": 4, "learn_input_range": False}, False),
        ({"rules": [Rule("stem", activation_bits=(4, 10))]}, True),
        ({"input_bits": 16}, False),
    ],
)
def test_the_data_need_no_gradient_for_a_boundary_of_many_bits(
    small_net: Build, x: Tensor, settings: dict[str, Any], learned: bool
) -> None:
    prepared = calibrate_(prepare_(small_net(), x, Config(**settings)), [x]).train()
    seen = []
    prepared.stem.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].requires_grad))
    functional.cross_entropy(prepared(x), torch.arange(4)).backward()
    own = next(q for q in quantizers(prepared) if q.name == "stem.input")
    assert seen == [learned]
    assert (own.alpha_raw.grad is not None) == learned
    assert all((p.grad is not None) for q in quantizers(prepared) for p in q.parameters() if q is not own)


def test_no_quantizer_parameter_gets_a_gradient_in_phase_float(model: nn.Module, x: Tensor) -> None:
    set_phase_(model, "float")
    model.train()(x).sum().backward()
    assert all(p.grad is None for q in quantizers(model) for p in q.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("original"))


def test_rounding_trains_the_boundaries_of_frozen_bits(model: nn.Module, x: Tensor) -> None:
    set_bits_(model, 4)
    set_phase_(model, "round")
    model.train()(x).square().sum().backward()
    assert all([name for name, _ in q.named_parameters()] == ["alpha_raw"] for q in quantizers(model))
    learned = [q.alpha_raw for q in quantizers(model) if q.name != "stem.input"]  # the image's stays as it was set
    assert all(alpha.grad is not None and alpha.grad.isfinite().all() for alpha in learned)


def test_all_parameters_exist_when_prepare_returns(small_net: Build, x: Tensor) -> None:
    prepared = prepare_(small_net(), x)
    names = [name for name, _ in prepared.named_parameters()]
    calibrate_(prepared, [x])
    prepared.train()(x)
    assert [name for name, _ in prepared.named_parameters()] == names
    assert all(p.dim() > 0 for p in prepared.parameters())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_integer_domain_agrees_with_rounding_and_batch_norm_comes_back(
    small_net: Build, x: Tensor, granularity: str
) -> None:
    prepared = calibrate_(prepare_(small_net(), x, Config(granularity=granularity)), [x])
    assert [row.spec.batchnorm for row in layer_table(prepared)][:2] == ["stem_norm", "depthwise_norm"]
    set_phase_(prepared, "round")
    expected = prepared(x)
    seen: list[Tensor] = []
    handle = prepared.stem_norm.register_forward_hook(lambda _module, args, result: seen.extend([args[0], result]))
    set_phase_(prepared, "int")
    found = prepared(x)
    assert seen[0] is seen[1]  # folded: it hands on what it gets
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    set_phase_(prepared, "round")
    assert torch.equal(prepared(x), expected)
    assert not torch.equal(seen[-2], seen[-1])
    handle.remove()
    assert prepared.stem_norm.forward.__func__ is nn.BatchNorm2d.forward


def test_autocast_trains(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(model.train()(x), torch.arange(4))
    loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in learned)


@pytest.mark.slow
def test_training_and_evaluation_compile_into_one_graph(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled.train()
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# ---------------------------------------------------------------------- settings


def test_the_image_input_is_fixed_at_eight_bits_and_the_rest_is_learned(model: nn.Module) -> None:
    rows = {row.name: row for row in layer_table(model)}
    assert rows["stem"].spec.is_input
    assert rows["stem"].input.is_frozen
    assert rows["stem"].input.bits_rounded == 8
    others = [row.input for name, row in rows.items() if name != "stem"] + [row.weight for row in rows.values()]
    assert not any(quantizer.is_frozen for quantizer in others)
    assert not any(row.spec.is_input for name, row in rows.items() if name != "stem")


def test_rules_reach_the_quantizers(small_net: Build, x: Tensor) -> None:
    config = Config(
        weight_bits=(3, 6),
        rules=[
            Rule("stem", granularity="channel", activation_bits={2, 4, 8}),
            Rule("s*z*", weight_bits=4, grid="signed"),
            Rule("excite", quantize=False),
            Rule("head", quantize_input=False),
        ],
    )
    prepared = prepare_(small_net(), x, config)
    rows = {row.name: row for row in layer_table(prepared)}
    assert list(rows) == ["stem", "depthwise", "squeeze", "head"]
    assert rows["stem"].weight.alpha.shape == (8,)
    assert rows["stem"].weight.bits.shape == (1,)
    assert rows["stem"].input.bit_range == BitRange(allowed=(2, 4, 8))
    assert rows["depthwise"].weight.bit_range == BitRange(min=3, max=6)
    assert rows["squeeze"].weight.bits_rounded == 4
    assert rows["head"].input is None
    calibrate_(prepared, [x])
    assert rows["squeeze"].input.grid.kind == "signed"
    assert rows["depthwise"].input.grid.kind == "shifted"
    assert [q.name for q in quantizers(prepared)][:2] == ["stem.weight", "stem.input"]


def test_settings_of_the_proxy_reach_every_quantizer(small_net: Build, x: Tensor) -> None:
    settings = {"noise": "empirical", "stochastic_bits": False, "clip_after_noise": True, "range_correction": True}
    for quantizer in quantizers(prepare_(small_net(), x, Config(**settings, init="max"))):
        assert quantizer.estimator == NoiseProxy(**settings)
        assert quantizer.init == "max"


def test_weights_only(small_net: Build, x: Tensor) -> None:
    prepared = prepare_(small_net(), x, Config(quantize_inputs=False))
    assert all(row.input is None for row in layer_table(prepared))
    expected = prepared(x)  # nothing to calibrate
    set_phase_(prepared, "int")
    assert torch.equal(prepared(x), expected)


# ---------------------------------------------------------------------- refusals


def test_preparing_twice_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(
        OrderError, match=r"SmallNet: expected a float model, found one that is prepared already.*restore_"
    ):
        prepare_(model, x)
    with pytest.raises(OrderError, match="prepared already"):
        prepare_(nn.Sequential(model), x)
    prepare_(restore_(model), x)


def test_restoring_a_float_model_is_refused(small_net: Build) -> None:
    with pytest.raises(OrderError, match="SmallNet: expected a prepared model, found no quantizer"):
        restore_(small_net())


def test_a_model_without_layers_is_refused(small_net: Build, x: Tensor) -> None:
    with pytest.raises(NotQuantizableError, match="Sequential: expected a convolution or linear layer"):
        prepare_(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(NotQuantizableError, match="no rule excludes"):
        prepare_(small_net(), x, Config(rules=[Rule("*", quantize=False)]))


def test_a_rule_that_matches_nothing_is_an_error_and_changes_nothing(small_net: Build, x: Tensor) -> None:
    plain = small_net()
    with pytest.raises(ConfigError, match=r"Rule 'stem\.\*': expected it to match a layer"):
        prepare_(plain, x, Config(rules=[Rule("stem.*", weight_bits=4)]))
    prepare_(plain, x)


def test_an_uncalibrated_forward_says_which_input(small_net: Build, x: Tensor) -> None:
    prepared = prepare_(small_net(), x)
    with pytest.raises(OrderError, match=r"stem\.input: expected a calibrated"):
        prepared(x)


def test_unquantized_ops_are_listed_by_name(small_net: Build, x: Tensor) -> None:
    listed = [finding.reason.split(":")[0] for finding in validate(small_net(), x)]
    assert listed == ["hardswish", "mean", "sigmoid", "mul", "add", "adaptive_avg_pool2d"]
