"""Attaching and taking off: what ``docs/design.md`` section 5 promises of a prepared model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nipq.calibrate import calibrate_
from nipq.config import BitRange, Config, Rule
from nipq.control import set_bits_, set_phase_
from nipq.errors import ConfigError, NotQuantizableError, OrderError
from nipq.layer_table import layer_table, quantizers
from nipq.nn.estimator import Estimator
from nipq.prepare import prepare_, restore_
from nipq.validate import validate

LAYERS = ["stem", "depthwise", "squeeze", "excite", "head"]


class SmallNet(nn.Module):
    """Convolution and batch norm, residual add, SE product, shifted activation, pool and classifier, on 3x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(x)))
        gate = torch.sigmoid(self.excite(functional.leaky_relu(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))))
        x = x + y * gate
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def small_net() -> SmallNet:
    """In evaluation mode, with batch-norm statistics that are not the first ones and scales of both signs."""
    model = SmallNet()
    with torch.no_grad():
        for norm in (model.stem_norm, model.depthwise_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 8, 8)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    return calibrate_(prepare_(small_net(), x), [x])


# ---------------------------------------------------------------------- invariants


def test_prepare_returns_the_model_itself_with_its_classes(x: Tensor) -> None:
    plain = small_net()
    assert prepare_(plain, x) is plain
    assert type(plain) is SmallNet
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
def test_restore_gives_the_model_back_bit_for_bit(x: Tensor, phase: str) -> None:
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


def test_phase_float_is_the_float_model_bit_for_bit(x: Tensor) -> None:
    plain = small_net()
    prepared = prepare_(copy.deepcopy(plain), x)
    set_phase_(prepared, "float")
    assert torch.equal(prepared(x), plain(x))
    assert torch.equal(prepared.train()(x), plain.train()(x))


@pytest.mark.parametrize("noise", ["uniform", "empirical"])
def test_every_quantizer_parameter_gets_a_gradient_in_one_noise_step(x: Tensor, noise: str) -> None:
    prepared = calibrate_(prepare_(small_net(), x, Config(noise=noise)), [x]).train()
    functional.cross_entropy(prepared(x), torch.arange(4)).backward()
    learned = [(q.name, name, p) for q in quantizers(prepared) for name, p in q.named_parameters()]
    assert len(learned) == 2 * (2 * len(LAYERS)) - 1  # the model's input has no learned bit-width
    for tensor, name, parameter in learned:
        assert parameter.grad is not None, (tensor, name)
        assert torch.isfinite(parameter.grad).all(), (tensor, name)
        assert parameter.grad.abs().sum() > 0, (tensor, name)


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
    assert all(q.alpha_raw.grad is not None and q.alpha_raw.grad.isfinite().all() for q in quantizers(model))


def test_all_parameters_exist_when_prepare_returns(x: Tensor) -> None:
    prepared = prepare_(small_net(), x)
    names = [name for name, _ in prepared.named_parameters()]
    calibrate_(prepared, [x])
    prepared.train()(x)
    assert [name for name, _ in prepared.named_parameters()] == names
    assert all(p.dim() > 0 for p in prepared.parameters())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_integer_domain_agrees_with_rounding_and_batch_norm_comes_back(x: Tensor, granularity: str) -> None:
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
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.slow
def test_training_and_evaluation_compile_into_one_graph(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled.train()
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---------------------------------------------------------------------- saving and copying


def test_state_dict_round_trip_without_pickle(model: nn.Module, x: Tensor) -> None:
    set_bits_(model, {"s*": {"weights": 3}})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = prepare_(small_net(), x)
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(twin(x), model(x))  # frozen ones and learned ones, calibrated, with their grids
    assert [q.is_frozen for q in quantizers(twin)] == [q.is_frozen for q in quantizers(model)]
    assert [q.grid for q in quantizers(twin)] == [q.grid for q in quantizers(model)]


def test_a_float_checkpoint_loads_strictly_after_prepare(x: Tensor) -> None:
    trained, prepared = small_net(), prepare_(small_net(), x)
    prepared.load_state_dict(trained.state_dict(), strict=True)
    set_phase_(prepared, "float")
    assert torch.equal(prepared(x), trained(x))


@pytest.mark.parametrize("phase", ["noise", "int"])
def test_a_deep_copy_is_independent(model: nn.Module, x: Tensor, phase: str) -> None:
    set_phase_(model, phase)
    expected = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        twin.stem_norm.running_mean.add_(1)
    changed = twin(x)
    assert torch.equal(model(x), expected)
    assert not torch.equal(changed, expected)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.copy_(other)
        model.stem_norm.running_mean.add_(1)
    assert torch.equal(model(x), changed)
    restore_(twin)
    assert torch.equal(model(x), changed)


def test_a_prepared_model_moves_to_another_type_and_back(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    assert model.double()(x.double()).dtype == torch.float64
    assert torch.equal(model.float()(x), expected)


# ---------------------------------------------------------------------- sharing


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.again(torch.relu(self.second(torch.relu(self.first(x))))))


def test_tied_weights_share_one_quantizer_and_stay_tied() -> None:
    x = torch.randn(3, 4)
    plain = Sharing()
    keys, outputs = list(plain.state_dict()), plain(x)
    prepared = calibrate_(prepare_(plain, x), [x])
    first, second, third = layer_table(prepared)
    assert first.weight is second.weight is not third.weight
    assert first.input is not second.input
    assert len(quantizers(prepared)) == 5
    stored = prepared.first.parametrizations.weight
    assert stored.original is prepared.second.parametrizations.weight.original
    assert stored is prepared.again.parametrizations.weight
    twin = copy.deepcopy(prepared)
    assert layer_table(twin)[0].weight is layer_table(twin)[1].weight
    restored = restore_(prepared)
    assert restored.first.weight is restored.second.weight
    assert restored.first is restored.again
    assert list(restored.state_dict()) == keys
    assert torch.equal(restored(x), outputs)


def test_tied_weights_cannot_have_two_settings() -> None:
    plain, x = Sharing(), torch.randn(1, 4)
    with pytest.raises(ConfigError, match="second: expected the settings of first, with which it shares its weight"):
        prepare_(plain, x, Config(rules=[Rule("second", weight_bits=4)]))
    assert not [name for name, _ in plain.named_parameters() if "parametrizations" in name]


def test_a_tied_weight_with_one_float_input_evaluates_in_the_integer_domain() -> None:
    x = torch.randn(3, 4)
    for name in ("first", "second"):
        rules = [Rule(name, quantize_input=False)]
        prepared = calibrate_(prepare_(Sharing(), x, Config(rules=rules)), [x])
        expected = prepared.eval()(x)
        set_phase_(prepared, "int")
        torch.testing.assert_close(prepared(x), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- settings


def test_the_image_input_is_fixed_at_eight_bits_and_the_rest_is_learned(model: nn.Module) -> None:
    rows = {row.name: row for row in layer_table(model)}
    assert rows["stem"].spec.is_input
    assert rows["stem"].input.is_frozen
    assert rows["stem"].input.bits_rounded == 8
    others = [row.input for name, row in rows.items() if name != "stem"] + [row.weight for row in rows.values()]
    assert not any(quantizer.is_frozen for quantizer in others)
    assert not any(row.spec.is_input for name, row in rows.items() if name != "stem")


def test_rules_reach_the_quantizers(x: Tensor) -> None:
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


def test_settings_of_the_proxy_reach_every_quantizer(x: Tensor) -> None:
    settings = {"noise": "empirical", "stochastic_bits": False, "clip_after_noise": True, "boundary_correction": True}
    for quantizer in quantizers(prepare_(small_net(), x, Config(**settings, init="max"))):
        assert quantizer.estimator == Estimator(**settings)
        assert quantizer.init == "max"


def test_weights_only(x: Tensor) -> None:
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


def test_restoring_a_float_model_is_refused() -> None:
    with pytest.raises(OrderError, match="SmallNet: expected a prepared model, found no quantizer"):
        restore_(small_net())


def test_a_model_without_layers_is_refused(x: Tensor) -> None:
    with pytest.raises(NotQuantizableError, match="Sequential: expected a convolution or linear layer"):
        prepare_(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(NotQuantizableError, match="no rule excludes"):
        prepare_(small_net(), x, Config(rules=[Rule("*", quantize=False)]))


def test_a_rule_that_matches_nothing_is_an_error_and_changes_nothing(x: Tensor) -> None:
    plain = small_net()
    with pytest.raises(ConfigError, match=r"Rule 'stem\.\*': expected it to match a layer"):
        prepare_(plain, x, Config(rules=[Rule("stem.*", weight_bits=4)]))
    prepare_(plain, x)


def test_an_uncalibrated_forward_says_which_input(x: Tensor) -> None:
    prepared = prepare_(small_net(), x)
    with pytest.raises(OrderError, match=r"stem\.input: expected a calibrated boundary"):
        prepared(x)


def test_float_pieces_are_listed_by_name(x: Tensor) -> None:
    listed = [finding.reason.split(":")[0] for finding in validate(small_net(), x)]
    assert listed == ["hardswish", "mean", "sigmoid", "mul", "add", "adaptive_avg_pool2d"]
