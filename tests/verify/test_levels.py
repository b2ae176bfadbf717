"""Verify holds for what convert makes, takes what loaders give, and leaves everything as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

import nipq
from nipq.config import Config, Rule
from nipq.errors import ConfigError, OrderError
from nipq.export.packed_write import save
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import phase_of, quantizers, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.verify import VerifyResult, verify
from nipq.verify.metrics import logits_of, logits_place

Make = Callable[..., tuple[nn.Module, list[Any]]]


def numbers(result: VerifyResult, name: str) -> dict[str, Any]:
    return next(check.numbers for check in result.checks if check.name.startswith(name))


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
def test_what_convert_makes_passes_every_check(made: Make, config: Config, tmp_path: Path) -> None:
    model, data = made(config)
    deployed = convert(model)
    path = save(deployed, tmp_path / "model")
    result = verify(model, deployed, data, file=path)
    assert result, str(result)
    assert result.first_difference is None
    assert [check.name[:2] for check in result.checks] == ["E0", "E1", "E2", "E3"]
    assert numbers(result, "E0")["bytes_found"] == path.stat().st_size
    assert numbers(result, "E3") == {"codes_apart": 0, "output_difference": 0.0}


def test_the_result_prints_and_is_json(trained: Any) -> None:
    model, data = trained
    result = verify(model, convert(model), data)
    text = str(result)
    assert "deployed model equals trained model" in text
    assert all(name in text for name in ("E0 static", "E1 layers", "E2 noise", "E3 exact"))
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


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


def test_phase_and_modes_are_restored(made: Make) -> None:
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


def test_phase_and_modes_are_restored_after_an_error(made: Make) -> None:
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


def test_learned_bits_are_refused_by_name(net: nn.Module, trained: Any) -> None:
    model, data = trained
    learned = prepare_(net, data[0][0])
    with pytest.raises(OrderError, match=r"stem\.weight: expected a frozen bit-width"):
        verify(learned, convert(model), data)


def test_a_model_that_is_not_deployed_is_refused(net: nn.Module, trained: Any) -> None:
    model, data = trained
    with pytest.raises(ConfigError, match="expected a deployed Net, found a Net without deployed layers"):
        verify(model, net, data)


def test_a_model_without_floating_outputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="floating tensors with a batch axis, found dict"):
        logits_place({"classes": torch.zeros(3, dtype=torch.int64), "loss": torch.zeros(())})


@pytest.mark.parametrize(
    "output",
    [
        {"loss": torch.zeros(()), "features": torch.ones(2, 3), "logits": torch.zeros(2, 5)},
        SimpleNamespace(features=torch.ones(2, 3), logits=torch.zeros(2, 5)),
        (torch.zeros(()), torch.zeros(2, 5), torch.ones(2, 3)),
    ],
)
def test_logits_are_known_by_name_and_are_never_a_loss(output: Any) -> None:
    assert torch.equal(logits_of(output, logits_place(output)), torch.zeros(2, 5))


# ---------------------------------------------------------------------- limits of the checks


def test_several_artifacts_climb_side_by_side(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    path = save(convert(model), tmp_path / "model.nipq.safetensors")
    result = verify(model, convert(model), path, str(path), loader=data)
    assert result, str(result)
    assert [check.artifact for check in result.checks] == ["deployed model"] * 4 + ["model.nipq.safetensors"] * 8
    assert "model.nipq.safetensors" in str(result)
    packed = result.checks[4].numbers
    assert packed["bytes_promised"] == packed["bytes_found"] == path.stat().st_size


def test_a_packed_file_alone_is_compared_to_the_last_bit(made: Make, trained: Any, tmp_path: Path) -> None:
    model, data = trained
    other, _ = made(bits=(3, 4))
    path = save(convert(other), tmp_path / "model.nipq.safetensors")
    result = verify(model, path, loader=data)
    assert str(result.first_difference).startswith("model.nipq.safetensors: stem: weight bits")
    assert not any(check.passed for check in result.checks if check.name in ("E0 static", "E1 layers", "E3 exact"))


def test_a_file_that_cannot_be_read_does_not_stop_the_others(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    broken = tmp_path / "broken.nipq.safetensors"
    broken.write_bytes(b"nothing")
    path = save(convert(model), tmp_path / "model.nipq.safetensors")
    result = verify(model, broken, path, loader=data, metric=lambda _model, _loader: 1.0)
    assert [check.passed for check in result.checks] == [False, True, True, True, True]
    assert result.checks[0].claim == "the file can be read"
    assert "expected a whole safetensors file" in str(result.first_difference)


@pytest.mark.parametrize("name", ["model.txt", "model.tflite"])
def test_an_unknown_kind_of_file_is_refused(trained: Any, tmp_path: Path, name: str) -> None:
    model, data = trained
    with pytest.raises(ConfigError, match=f"expected a file ending in .* found {name}"):
        verify(model, tmp_path / name, loader=data)


def test_artifacts_and_a_loader_are_asked_for(trained: Any) -> None:
    model, data = trained
    for arguments, keywords in (((), {"loader": data}), ((data,), {}), ((convert(model),), {}), ((), {})):
        with pytest.raises(ConfigError, match="expected deployed models or files and one loader"):
            verify(model, *arguments, **keywords)


def test_a_file_goes_with_one_module(trained: Any, tmp_path: Path) -> None:
    model, data = trained
    with pytest.raises(ConfigError, match="expected one deployed module with file='x', found 2"):
        verify(model, convert(model), convert(model), loader=data, file="x")


# ---------------------------------------------------------------------- right models that once were said to differ


def deployed_pair(model: nn.Module, x: Any) -> tuple[nn.Module, nn.Module]:
    config = nipq.Config(weight_bits=4, activation_bits=6)
    trained = nipq.calibrate_(nipq.prepare_(model.eval(), x, config), [x]).eval()
    return trained, nipq.convert(trained, x)


def test_what_stays_float_runs_in_the_same_kernels() -> None:
    """Cross attention stays float; torch folds its products in another way where weights require gradients."""
    x = (torch.randn(4, 5, 8), torch.randn(4, 5, 8))
    trained, deployed = deployed_pair(nn.Transformer(8, 2, 1, 1, 16, batch_first=True, dropout=0.0), x)
    before = [parameter.requires_grad for parameter in trained.parameters()]
    result = nipq.verify(trained, deployed, [x])
    assert result, str(result)
    assert [parameter.requires_grad for parameter in trained.parameters()] == before


def test_results_of_a_part_in_half_precision_may_differ_by_its_roundings() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 3).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(torch.relu(self.body(x)).bfloat16())
            return found.float()

    x = torch.randn(64, 12)
    trained, deployed = deployed_pair(Mixed(), x)
    result = nipq.verify(trained, deployed, [x])
    assert result, str(result)


def test_a_hook_that_changes_an_output_comes_after_the_layer_in_files_too(tmp_path: Path) -> None:
    x = torch.randn(6, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    model[2].register_forward_hook(lambda _module, _args, output: 2 * output)
    trained, deployed = deployed_pair(model, x)
    paths = [tmp_path / name for name in ("model.onnx", "model.npz", "model.pt2")]
    for path in paths:
        nipq.export(deployed, path, x)
    for artifact in (deployed, *paths):
        result = nipq.verify(trained, artifact, [x])
        assert result, str(result)
