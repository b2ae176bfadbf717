"""Post-training quantization: the user's model stays, budgets are kept, stages are judged, bad input is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import nipq
from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize
from nipq.config import Config
from nipq.errors import BudgetError, ConfigError, NonFiniteError, NotQuantizableError, OrderError
from nipq.prepare.layer_table import layer_table, quantizers
from nipq.ptq.quantize import QuantizedModel, quantize

BUDGET = AverageBits(weights=4, activations=4)


def images(count: int = 48, size: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 8, 8, generator=generator).split(size))


def cnn() -> nn.Module:
    """A small network whose batch norms have seen data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        for batch in images(seed=1) * 20:
            model(batch)
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def rows(count: int = 40) -> list[Tensor]:
    return list(torch.randn(count, 6, generator=torch.Generator().manual_seed(0)).split(10))


@pytest.fixture(scope="module")
def result() -> QuantizedModel:
    return quantize(cnn(), images(), BUDGET)


def test_the_model_that_was_given_stays_bit_for_bit() -> None:
    model = cnn().train()
    model[4].eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    batches = [batch.clone() for batch in images()]
    quantize(model, batches, BUDGET, epochs=1)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(batches, images(), strict=True))
    nipq.prepare_(model, batches[0])  # and nothing hangs on it


@pytest.mark.parametrize(
    "budget", [BUDGET, AverageBits(weights=2.5), AverageBits(activations=3.5) & ModelSize("4 kB"), BitOps("700 k")]
)
def test_the_budget_is_kept_and_bits_are_frozen(budget: Budget) -> None:
    found = quantize(cnn(), images(), budget)
    assert all(quantizer.is_frozen and quantizer.calibrated for quantizer in quantizers(found.model))
    for limit in found.report.limits:
        assert limit.rounded <= limit.target
    assert {limit.name for limit in found.report.limits} == {limit.name for limit in budget.limits(found.model)}
    assert not any(module.training for module in found.model.modules())


def test_without_a_budget_every_tensor_has_the_most_bits() -> None:
    found = quantize(cnn(), images())
    assert {row.weight.bits_rounded for row in layer_table(found.model)} == {8}
    assert found.report.limits == ()
    assert found.report.stages[0].distance < 0.01
    fixed = quantize(cnn(), images(), config=Config(weight_bits=3, activation_bits=5))
    assert (fixed.report.weight_bits, fixed.report.activation_bits) == (3, 5)


def test_mixed_bits_are_nearer_to_float_than_one_width() -> None:
    """Outputs lean on two layers very unequally, which one width for all cannot serve."""

    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.quiet = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return 30 * self.loud(x) + self.quiet(x)

    found = quantize(Unequal(), rows(), AverageBits(weights=4))
    stages = {stage.name: stage for stage in found.report.stages}
    assert stages["mixed bits, round 1"].kept
    assert stages["mixed bits, round 1"].distance < 0.5 * stages["ranges"].distance
    bits = {row.name: row.weight.bits_rounded for row in layer_table(found.model)}
    assert bits["loud"] > 4 > bits["quiet"]


def test_held_out_samples_are_the_last_quarter_and_calibrate_nothing() -> None:
    """Values that only held-out samples have do not widen the ranges."""
    batches = images(48)
    huge = [*batches[:3], 1000 * batches[3]]
    a, b = (quantize(cnn(), loader, config=Config(weight_bits=8, activation_bits=8)) for loader in (batches, huge))
    assert (a.report.fit_samples, a.report.held_out_samples) == (36, 12)
    for one, other in zip(layer_table(a.model), layer_table(b.model), strict=True):
        assert one.input is not None
        assert other.input is not None
        assert torch.equal(one.input.alpha, other.input.alpha)


def test_large_batches_are_cut_and_only_so_many_samples_are_read() -> None:
    read = []

    def stream() -> Iterable[Tensor]:
        for number in range(10):
            read.append(number)
            yield torch.cat(images(50, seed=number))

    found = quantize(cnn(), stream(), BUDGET, samples=120)
    assert read == [0, 1, 2]
    assert (found.report.fit_samples, found.report.held_out_samples) == (90, 30)


def test_an_mlp_is_quantized_without_batch_norms() -> None:
    found = quantize(mlp(), rows(), BUDGET)
    assert "batch norms" not in [stage.name for stage in found.report.stages]
    assert found.verify(rows())


def test_a_bert_with_batches_of_names() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    generator = torch.Generator().manual_seed(0)
    loader = [
        {
            "input_ids": torch.randint(0, 50, (8, 6 + number), generator=generator),
            "attention_mask": torch.ones(8, 6 + number, dtype=torch.int64),
            "labels": torch.randint(0, 3, (8,), generator=generator),
        }
        for number in range(4)
    ]
    found = quantize(model, loader, AverageBits(weights=5, activations=6))
    assert found.report.agreement is not None
    assert found.report.distance < 0.2
    trained = quantize(
        model, loader, AverageBits(weights=5, activations=6), epochs=1,
        loss_fn=lambda outputs, labels: cross_entropy(outputs.logits, labels),
    )  # fmt: skip
    assert trained.report.stages[-1].name == "training"


class TwoOutputs(nn.Module):
    """A mapping of two inputs to a tuple and a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"sum": self.left(left) + self.right(right), "more": (self.left(left).relu(), torch.arange(3))}


def test_models_with_several_inputs_and_outputs() -> None:
    loader = [{"left": batch, "right": batch.flip(1)} for batch in rows()]
    found = quantize(TwoOutputs(), loader, AverageBits(weights=6))
    assert found.report.agreement is None
    assert found.report.distance < 0.05
    assert found.model(**loader[0]).keys() == {"sum", "more"}


class Masked(nn.Module):
    """A causal mask as many models keep one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.mask.softmax(-1))


def test_a_mask_may_hold_infinity(tmp_path: Path) -> None:
    found = quantize(Masked(), rows(), AverageBits(weights=6))
    assert found.verify(rows(), found.save(tmp_path / "model.nipq.safetensors"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off_around_it(mode: Any) -> None:
    expected = quantize(mlp(), rows(), BUDGET, epochs=1)
    with mode():
        found = quantize(mlp(), rows(), BUDGET, epochs=1)
        assert torch.is_grad_enabled() is False
    assert found.report.distance == expected.report.distance


def test_batches_of_one_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    for loader in ([torch.cat(rows(43))], list(torch.cat(rows()).split(1))):
        assert quantize(model, loader, BUDGET).report.distance < 0.1


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """Samples whose number nobody knows."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.cat(rows())


def test_training_counts_the_batches_of_a_loader_without_a_length() -> None:
    found = quantize(mlp(), torch.utils.data.DataLoader(Stream(), 10), BUDGET, epochs=2)
    expected = quantize(mlp(), rows(), BUDGET, epochs=2)
    assert found.report.distance == expected.report.distance


def test_a_network_without_gradients_trains_its_ranges() -> None:
    loader = [(x, torch.arange(len(x)) % 3) for x in rows()]
    found = quantize(mlp().requires_grad_(False), loader, BUDGET, epochs=1, loss_fn=cross_entropy)
    assert torch.equal(found.model[0].parametrizations.weight.original, mlp()[0].weight)
    with pytest.raises(ConfigError, match=r"expected a scalar tensor .* found float"):
        quantize(mlp().requires_grad_(False), loader, BUDGET, loss_fn=lambda *_: 1.0)


def test_training_towards_float_is_kept_only_if_nearer() -> None:
    found = quantize(cnn(), images(), AverageBits(weights=3, activations=3), epochs=4, lr=1e-3)
    stage = found.report.stages[-1]
    assert (stage.name, stage.kept) == ("training", True)
    assert stage.distance < min(s.distance for s in found.report.stages[:-1])
    ruined = quantize(cnn(), images(), AverageBits(weights=3, activations=3), epochs=1, lr=3.0)
    assert not ruined.report.stages[-1].kept
    raw = quantize(cnn(), images(), AverageBits(weights=3, activations=3))
    x = images()[0]
    assert torch.equal(ruined.model(x), raw.model(x))
    assert ruined.report.distance == raw.report.distance


def test_training_by_labels_lowers_the_loss_within_the_budget() -> None:
    x = torch.cat(rows(160))
    y = (x[:, 0] > 0).long()
    loader, budget = list(zip(x.split(16), y.split(16), strict=True)), AverageBits(weights=3, activations=4)
    before = quantize(mlp(), loader, budget)
    after = quantize(mlp(), loader, budget, epochs=10, loss_fn=cross_entropy, lr=1e-2)
    with torch.no_grad():
        assert cross_entropy(after.model(x), y) < 0.5 * cross_entropy(before.model(x), y)
    assert all(limit.rounded <= limit.target for limit in after.report.limits)


def test_equal_calls_give_equal_results() -> None:
    first, second = (quantize(cnn(), images(), BUDGET, epochs=1, seed=3) for _ in range(2))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_files_hold_the_model(result: QuantizedModel, tmp_path: Path) -> None:
    packed = result.save(tmp_path / "model.nipq.safetensors")
    assert packed.stat().st_size == result.report.file_bytes
    loaded = nipq.load(packed, cnn())
    x = images()[0]
    assert torch.equal(loaded(x), result.deployed(x))
    assert result.deployed is result.deployed
    exported = result.export(tmp_path / "model.npz")
    assert exported.path.is_file()
    checked = result.verify(images(), packed, tmp_path / "model.npz")
    assert checked, checked
    with pytest.raises(ConfigError, match="expected a name that is free"):
        result.save(packed)


def test_the_report_prints_within_80_columns_and_is_json(result: QuantizedModel) -> None:
    text = str(result.report)
    assert text == str(result)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("ranges", "mixed bits, round 1", "batch norms", "average bits: ", "36 samples to measure"):
        assert words in text
    values = result.report.to_dict()
    assert values["distance"] == result.report.distance
    assert [stage["name"] for stage in values["stages"]] == [stage.name for stage in result.report.stages]


def test_stages_are_announced() -> None:
    told: list[str] = []
    found = quantize(cnn(), images(), BUDGET, progress=told.append)
    assert told == [stage.name for stage in found.report.stages]


def _prepared() -> nn.Module:
    return nipq.prepare_(cnn(), images()[0])


def _deployed() -> nn.Module:
    return quantize(cnn(), images()).deployed


def _broken() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model


LABELLED = [(batch, torch.zeros(len(batch), 3)) for batch in rows()]


@pytest.mark.parametrize(
    ("model", "loader", "settings", "error", "message"),
    [
        (mlp, [], {}, ConfigError, "quantize: expected at least one batch, found an empty loader"),
        (mlp, [torch.zeros(1, 6)], {}, ConfigError, "expected at least 2 samples in the loader, found 1"),
        (mlp, [torch.ones(4, 6)] * 3, {}, ConfigError, "expected samples that differ, found that all are equal"),
        (mlp, ["text"], {}, ConfigError, "quantize, batch 0: expected batches with tensors that the model takes"),
        (mlp, [torch.full((4, 6), float("nan"))], {}, NonFiniteError, "expected finite samples, found NaN"),
        (mlp, rows(), {"samples": 1}, ConfigError, "expected samples of at least 2, found 1"),
        (mlp, rows(), {"epochs": -1}, ConfigError, "expected epochs of 0 or more, found -1"),
        (lambda: mlp().half(), rows(), {"epochs": 1}, ConfigError, "in float32 or bfloat16 to train, found float16"),
        (mlp, iter(rows()), {"epochs": 1}, ConfigError, "expected a loader that can be read several times"),
        (mlp, rows(), {"budget": AverageBits(weights=1.5)}, BudgetError, "expected average weight bits within 2 to 8"),
        (_prepared, images(), {}, OrderError, "expected a float model, found one that is quantized already"),
        (_deployed, images(), {}, OrderError, "expected a float model, found one that is quantized already"),
        (_broken, rows(), {}, NonFiniteError, r"0\.weight: expected finite numbers, found NaN"),
        (nn.ReLU, rows(), {}, ConfigError, "expected a model with parameters, found none"),
        (lambda: nn.BatchNorm1d(6), rows(), {}, NotQuantizableError, "expected a convolution or linear layer"),
        (mlp, rows(), {"loss_fn": mse_loss}, ConfigError, r"expected batches \(inputs, targets\)"),
        (
            mlp,
            LABELLED,
            {"loss_fn": lambda y, t: (y - t).square()},
            ConfigError,
            r"expected a scalar tensor that depends on the outputs, found shape \[2, 3\]",
        ),
        (mlp, LABELLED, {"loss_fn": lambda *_: 1.0}, ConfigError, "expected a scalar tensor .* found float"),
        (mlp, LABELLED, {"loss_fn": lambda y, _: y.sum().detach()}, ConfigError, "found one without a gradient"),
        (mlp, LABELLED, {"loss_fn": lambda y, _: y.sum() * float("nan")}, NonFiniteError, "expected a finite loss"),
        (mlp, LABELLED, {"loss_fn": lambda y, t: cross_entropy(y, t[:, :1])}, ConfigError, "found that it fails"),
    ],
)
def test_bad_input_is_refused_before_work_begins(
    model: Callable[[], nn.Module],
    loader: Iterable[Any],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = model()

    def work(*_: object, **__: object) -> None:
        raise AssertionError("calibration began")

    monkeypatch.setattr("nipq.ptq.quantize.calibrate_", work)
    with pytest.raises(error, match=message):
        quantize(subject, loader, **settings)


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).log()

    with pytest.raises(NonFiniteError, match="Log: expected finite outputs of the float model"):
        quantize(Log(), rows(), AverageBits(weights=4))
