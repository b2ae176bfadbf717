"""Verify holds for what convert makes, and names whatever is not what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, hardswish, relu

from nipq.calibrate import calibrate_
from nipq.config import Config, Rule
from nipq.control import phase_of, set_phase_
from nipq.deploy.convert import convert
from nipq.deploy.file import save
from nipq.deploy.modules import DeployedLayer
from nipq.errors import ConfigError, OrderError
from nipq.layer_table import quantizers
from nipq.prepare import prepare_
from nipq.verify import VerifyResult, verify
from nipq.verify.distance import Distance, labels_of, logits_of
from nipq.verify.layers import Evidence

CLASSES = 4


class Net(nn.Module):
    """conv-bn-relu, a depthwise residual, hard-swish (a zero point), two layers of one shape, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 8, 1)
        self.two = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem_bn(self.stem(x)))
        x = relu(x + self.depthwise_bn(self.depthwise(x)))
        x = hardswish(self.one(x))
        x = relu(self.two(x))
        return self.head(x.mean((2, 3)))


def batches(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Bumps in one of four corners: a task that is learned in a few steps."""
    labels = torch.arange(count) % CLASSES
    images = 0.5 * torch.randn(count, 2, 6, 6)
    for corner in range(CLASSES):
        rows, columns = slice(3 * (corner // 2), 3 * (corner // 2) + 3), slice(3 * (corner % 2), 3 * (corner % 2) + 3)
        images[labels == corner, 0, rows, columns] += 1.5
        images[labels == corner, 1] += corner
    return [(images, labels)]


def made(config: Config | None = None, bits: tuple[int, ...] = (4, 6, 3, 5)) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model, data = Net(), batches()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
    rules = (Rule("two", grid="shifted"),)
    prepare_(model, data[0][0], config or Config(granularity="channel", rules=rules))
    calibrate_(model, data)
    for i, quantizer in enumerate(quantizers(model)):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(bits[i % len(bits)])
    return model.eval(), data


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Any]]:
    return made()


def rungs(result: VerifyResult) -> dict[str, bool]:
    return {rung.name[:2]: rung.passed for rung in result.rungs}


def numbers(result: VerifyResult, name: str) -> dict[str, Any]:
    return next(rung.numbers for rung in result.rungs if rung.name.startswith(name))


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(granularity="channel"),
        Config(quantize_inputs=False),
        Config(input_bits=None, rules=(Rule("one", quantize=False),)),
    ],
    ids=["default", "channel", "weights only", "partly float"],
)
def test_what_convert_makes_passes_every_rung(config: Config, tmp_path: Path) -> None:
    model, data = made(config)
    deployed = convert(model)
    path = save(deployed, tmp_path / "model")
    result = verify(model, deployed, data, file=path)
    assert result, str(result)
    assert result.first_difference is None
    assert list(rungs(result)) == ["E0", "E1", "E2", "E3"]
    assert numbers(result, "E0")["bytes_found"] == path.stat().st_size
    assert numbers(result, "E3") == {"codes_apart": 0, "output_difference": 0.0}


def test_the_result_prints_and_is_json(trained: Any) -> None:
    model, data = trained
    result = verify(model, convert(model), data)
    text = str(result)
    assert "deployed model equals trained model" in text
    assert all(name in text for name in ("E0 static", "E1 layers", "E2 noise", "E3 exact"))
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


# ---------------------------------------------------------------------- planted faults


def one_ulp(deployed: Any) -> None:
    deployed.stem.scale[3] = torch.nextafter(deployed.stem.scale[3], torch.tensor(9.0))


def swapped_weights(deployed: Any) -> None:
    one, two = deployed.one.layer, deployed.two.layer
    one.weight, two.weight = two.weight, one.weight


def one_code(deployed: Any) -> None:
    deployed.two.weight[0, 0] += 1


def one_bit_more(deployed: Any) -> None:
    layer = deployed.one
    layer.input_bits += 1
    layer.code_high = 2 * layer.code_high + 1


def zero_point_off_by_one(deployed: Any) -> None:
    layer = deployed.two
    assert layer.grid == "shifted"
    layer.zero_point += 1
    layer.code_low -= 1
    layer.code_high -= 1


def offset(deployed: Any) -> None:
    deployed.depthwise.offset[0] += 0.01


def step(deployed: Any) -> None:
    deployed.head.input_step.mul_(1.01)


def float_part(deployed: Any) -> None:
    deployed.extra = nn.Linear(1, 1)


def unconverted(deployed: Any) -> None:
    deployed.head = nn.Linear(8, CLASSES)


@pytest.mark.parametrize(
    ("fault", "where", "what"),
    [
        (one_ulp, "stem", "scale: 1 of 8 differ"),
        (swapped_weights, "one", "weight"),
        (one_code, "two", "weight codes: 1 of 64 differ"),
        (one_bit_more, "one", "input bits"),
        (zero_point_off_by_one, "two", "zero point"),
        (offset, "depthwise", "offset: 1 of 8 differ"),
        (step, "head", "step of the input"),
        (float_part, "extra.weight", "only deployed"),
        (unconverted, "head", "does not"),
    ],
)
def test_a_planted_fault_is_found_without_running_anything(
    trained: Any, fault: Callable[[Any], None], where: str, what: str
) -> None:
    model, data = trained
    deployed = convert(model)
    fault(deployed)
    result = verify(model, deployed, data)
    assert not result
    assert not rungs(result)["E0"]
    assert result.first_difference is not None
    assert result.first_difference.startswith(where)
    assert what in str(result.rungs[0].first_difference)
    assert "DIFFERS" in str(result)


@pytest.mark.parametrize("fault", [swapped_weights, zero_point_off_by_one, offset, step])
def test_a_fault_that_matters_is_found_by_running_as_well(trained: Any, fault: Callable[[Any], None]) -> None:
    model, data = trained
    deployed = convert(model)
    fault(deployed)
    result = rungs(verify(model, deployed, data))
    assert not result["E1"]
    assert not result["E3"]


class OtherArithmetic(DeployedLayer):
    """Rightly converted, wrongly computed: E0 cannot see it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * (1 + 1e-4)


class ShortRange(DeployedLayer):
    """Clips one code too early."""

    def codes(self, x: Tensor) -> Tensor:
        return super().codes(x).clamp(max=self.code_high - 1)


def test_a_layer_that_computes_otherwise_is_found_and_named(trained: Any) -> None:
    model, data = trained
    deployed = convert(model)
    deployed.one.__class__ = OtherArithmetic
    result = verify(model, deployed, data)
    assert rungs(result)["E0"]
    assert not rungs(result)["E1"]
    assert result.first_difference is not None
    assert result.first_difference.startswith("one: the output differs by")


def test_a_quantizer_that_computes_otherwise_is_found_and_named(trained: Any) -> None:
    model, data = trained
    deployed = convert(model)
    deployed.two.__class__ = ShortRange
    result = verify(model, deployed, data)
    assert rungs(result)["E0"]
    assert result.first_difference is not None
    assert result.first_difference.startswith("two:")
    assert "codes differ on the same input" in result.first_difference


def test_a_missing_activation_shows_in_the_next_layers_codes(trained: Any) -> None:
    """Every layer is right, but what happens between two of them is not."""
    model, data = trained
    deployed = convert(model)
    deployed.stem_bn = nn.Hardtanh(0.0, 0.5)
    result = verify(model, deployed, data)
    assert rungs(result)["E0"]
    assert not rungs(result)["E1"]
    assert str(result.first_difference).startswith("depthwise: codes of what arrived")


def test_a_wrong_output_without_any_layer_at_fault_is_found() -> None:
    model, data = made()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return 2 * self.inner(x)

    prepared = nn.Sequential(model)
    deployed = convert(prepared)
    deployed[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    result = verify(prepared, deployed, data)
    assert rungs(result) == {"E0": True, "E1": True, "E2": False, "E3": False}
    assert "of the largest apart" in str(result.first_difference)
    assert result.rungs[3].first_difference == "the outputs differ though all codes agree"


# ---------------------------------------------------------------------- the file


def test_a_file_of_another_training_is_found(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    other, _ = made(bits=(3, 4))
    path = save(convert(other), tmp_path / "model")
    result = verify(model, convert(model), data, file=path)
    assert rungs(result) == {"E0": False, "E1": True, "E2": True, "E3": True}
    assert "promised" in str(result.first_difference)


def test_a_file_whose_numbers_differ_is_found(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    wrong = convert(model)
    one_ulp(wrong)
    result = verify(model, convert(model), data, file=save(wrong, tmp_path / "model"))
    assert str(result.first_difference).startswith("stem: scale: 1 of 8 differ")
    assert "saved against in the file" in str(result.first_difference)


def test_a_file_that_cannot_be_read_fails_the_first_rung(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    path = tmp_path / "model"
    path.write_text("no model")
    result = verify(model, convert(model), data, file=path)
    assert not rungs(result)["E0"]
    assert "expected a whole safetensors file" in str(result.first_difference)


# ---------------------------------------------------------------------- loaders, metrics, state


def test_accuracy_is_that_of_the_labels(trained: Any) -> None:
    model, data = trained
    found = numbers(verify(model, convert(model), data), "E2")
    set_phase_(model, "round")
    with torch.no_grad():
        right = model(data[0][0]).argmax(1) == data[0][1]
    assert found["accuracy_trained"] == pytest.approx(100 * float(right.float().mean()))
    assert found["accuracy_deployed"] == found["accuracy_trained"]
    assert found["samples"] == 40


def test_a_metric_of_ones_own_runs_on_both_models(trained: Any) -> None:
    model, data = trained

    def largest(module: nn.Module, loader: Iterable[Any]) -> float:
        return max(float(module(x).max()) for x, _ in loader)

    found = numbers(verify(model, convert(model), iter(data), metric=largest), "E2")
    assert found["metric_deployed"] == pytest.approx(found["metric_trained"], rel=0.05)
    assert "accuracy_trained" not in found


def test_batches_may_be_bare_tensors(trained: Any) -> None:
    model, data = trained
    result = verify(model, convert(model), [data[0][0]])
    assert result
    assert "accuracy_trained" not in numbers(result, "E2")


def test_batches_may_be_keywords_and_outputs_nested() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, scale: float) -> dict[str, Any]:
            return {"mask": x > 0, "logits": [self.layer(x) * scale]}

    x = torch.randn(9, 3)
    model = prepare_(Keyed(), {"x": x, "scale": 2.0}, Config(weight_bits=4))
    calibrate_(model, [{"x": x, "scale": 2.0}])
    result = verify(model, convert(model), [{"x": x, "scale": 2.0, "labels": torch.zeros(9, dtype=torch.int64)}])
    assert result, str(result)
    assert "accuracy_deployed" in numbers(result, "E2")


def test_a_layer_called_twice_is_compared_at_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(relu(self.layer(x)))

    x = torch.randn(16, 4)
    model = prepare_(Twice(), x, Config(weight_bits=4))
    calibrate_(model, [x])
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(5)
    result = verify(model, convert(model), [x])
    assert result, str(result)
    assert numbers(result, "E1")["codes"] == 2 * 16 * 4


def test_phase_and_modes_are_restored() -> None:
    model, data = made()
    deployed = convert(model)
    model.train()
    model.stem_bn.eval()
    set_phase_(model, "noise")
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    verify(model, deployed, data)
    assert phase_of(model) == "noise"
    assert model.training
    assert not model.stem_bn.training
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in deployed.modules())


def test_phase_and_modes_are_restored_after_an_error() -> None:
    model, _ = made()
    deployed = convert(model)
    set_phase_(model.train(), "noise")
    with pytest.raises(RuntimeError, match="channels"):
        verify(model, deployed, [torch.zeros(2, 9, 6, 6)])
    assert phase_of(model) == "noise"
    assert model.training


def test_an_empty_loader_is_refused(trained: Any) -> None:
    model, _ = trained
    with pytest.raises(ConfigError, match="expected at least one batch"):
        verify(model, convert(model), [])


def test_learned_bits_are_refused_by_name(trained: Any) -> None:
    model, data = trained
    learned = prepare_(Net(), data[0][0])
    with pytest.raises(OrderError, match=r"stem\.weight: expected a frozen bit-width"):
        verify(learned, convert(model), data)


def test_a_model_that_is_not_deployed_is_refused(trained: Any) -> None:
    model, data = trained
    with pytest.raises(ConfigError, match="expected a deployed Net, found a Net without deployed layers"):
        verify(model, Net(), data)


def test_a_model_without_floating_outputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a model that returns floating tensors, found dict"):
        logits_of({"classes": torch.zeros(3, dtype=torch.int64)})


# ---------------------------------------------------------------------- limits of the rungs


def test_one_flip_of_one_level_is_allowed_and_no_more() -> None:
    assert Evidence(codes=100, flips=1, jump=1).layer_fault() is None
    assert "flipped" in str(Evidence(codes=100, flips=2, jump=1).layer_fault())
    assert Evidence(codes=50_000, flips=5, jump=1).layer_fault() is None
    assert "flipped" in str(Evidence(codes=50_000, flips=6, jump=1).layer_fault())
    assert "by up to 2 levels" in str(Evidence(codes=50_000, flips=1, jump=2).layer_fault())


def test_what_is_not_a_number_fails() -> None:
    nan = float("nan")
    assert Evidence(codes=9, jump=nan).layer_fault() is not None
    assert Evidence(codes=9, error=nan, largest=1).layer_fault() is not None
    distance = Distance()
    distance.add(torch.ones(4, 2), torch.full((4, 2), nan), torch.ones(4, 2), None)
    assert not distance.rung({}).passed


def test_calls_that_differ_fail_both_layer_rungs() -> None:
    seen = Evidence(calls_differ=True)
    assert "differently often" in str(seen.layer_fault())
    assert "differently often" in str(seen.exact_fault())


def test_the_limit_of_the_distance_is_the_models_own_noise() -> None:
    """Largest logit 1, own noise 0.02: 0.05 passes, 0.07 does not; without noise three flips, 0.09 / samples."""
    trained = torch.eye(4).repeat(25, 1)

    def passes(batch_noise: float, kernel_noise: float, apart: float) -> bool:
        distance = Distance()
        distance.add_batch_noise(trained, trained + batch_noise)
        distance.add_kernel_noise(trained, trained + kernel_noise)
        distance.add(trained, trained + apart, trained, None)
        return distance.rung({}).passed

    for noise in ((0.02, 0.0), (0.0, 0.02)):
        assert passes(*noise, 0.05)
        assert not passes(*noise, 0.07)
    assert passes(0.0, 0.0, 8.9e-4)
    assert not passes(0.0, 0.0, 9.1e-4)


def test_decisions_must_agree_unless_the_trained_model_disagrees_with_itself() -> None:
    logits = torch.tensor([[1.0, 0.9999]]).repeat(1000, 1)

    def passes(flipped: int, own: int) -> bool:
        other, again = logits.clone(), logits.clone()
        other[:flipped] = other[:flipped].flip(1)
        again[:own] = again[:own].flip(1)
        distance = Distance()
        distance.add_batch_noise(logits, again)
        distance.add_kernel_noise(logits, again)
        distance.add(logits, other, other, None)
        return distance.rung({}).passed

    assert passes(5, 0)
    assert not passes(6, 0)
    assert passes(30, 10)
    assert not passes(31, 10)


def test_labels_are_found_where_loaders_put_them() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert labels_of((x, y)) is y
    assert labels_of({"pixels": x, "labels": y}) is y
    assert labels_of(x) is None
    assert labels_of((x,)) is None
    assert labels_of((x, x)) is None
