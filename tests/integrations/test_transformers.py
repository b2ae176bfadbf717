"""transformers' Trainer after one call of quantize."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nipq.budget.budget import AverageBits
from nipq.config import Config
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import phase_of, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import param_groups
from tests.integrations.tiny_bert import BUDGET, bert, data, keeps

transformers = pytest.importorskip("transformers")
quantized = pytest.importorskip("nipq.integrations.transformers")
Trainer, quantize = transformers.Trainer, partial(quantized.quantize, finetune=0.3)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_one_call_is_enough(build: Callable[..., Any]) -> None:
    trainer = build()
    callback = quantize(trainer, BUDGET)
    trainer.train()
    assert (callback.session.stage, callback.session.steps, callback.session.total_steps) == ("done", 24, 24)
    assert keeps(trainer.model)
    assert str(phase_of(trainer.model)) == "round"
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.01, "no_decay": 0, "ranges": 0, "bits": 0
    }  # fmt: skip
    assert groups["bits"]["initial_lr"] == quantized.BITS_LR
    assert groups["ranges"]["initial_lr"] == quantized.RANGE_LR
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    logged = [entry for entry in trainer.state.log_history if "nipq/frozen" in entry]
    assert [entry["nipq/frozen"] for entry in logged] == [0, 0, 1, 1]
    assert "nipq/average_weight_bits_soft" in logged[0]


def test_evaluation_and_prediction_have_no_penalty(build: Callable[..., Any]) -> None:
    trainer = build(eval_strategy="steps", eval_steps=6)
    callback = quantize(trainer, BUDGET)

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, model: nn.Module, **_: Any) -> None:
            was = model.training
            model.eval()
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in data()]) for name in data()[0]}
            with torch.no_grad():
                assert metrics["eval_loss"] == pytest.approx(float(model(**batch).loss), rel=1e-4)
            model.train(was)

    trainer.add_callback(Watch())
    trainer.train()
    assert callback.session.stage == "done"


@pytest.mark.parametrize("at", [11, 20])
@pytest.mark.parametrize("own", [False, True])
def test_resuming_equals_not_stopping_to_the_bit(build: Callable[..., Any], tmp_path: Path, at: int, own: bool) -> None:
    """In the middle of an epoch, before and after the freeze, with the trainer's optimizer and with the user's."""

    def start() -> tuple[Any, Any]:
        model = bert()
        if not own:
            trainer = build(model, save_strategy="steps", save_steps=at)
            return trainer, quantize(trainer, BUDGET)
        prepare_(model, {"input_ids": torch.zeros(1, 6, dtype=torch.int64)})
        first = build(model)
        optimizer = torch.optim.AdamW(param_groups(model, 1e-3, bits_lr=1e-2))
        trainer = build(model, save_strategy="steps", save_steps=at, given={"optimizers": (optimizer, None)})
        calibrate_(model, [next(iter(first.get_train_dataloader()))])
        return trainer, quantize(trainer, BUDGET)

    trainer, _ = start()
    trainer.train()
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    again, callback = start()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert callback.session.steps == 24
    found = again.model.state_dict()
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_the_best_model_is_one_after_the_freeze(build: Callable[..., Any]) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 4}
    trainer = build(**best, save_strategy="steps", save_steps=4)
    callback = quantize(trainer, BUDGET)
    trainer.train()
    assert callback.session.stage == "done"
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) > callback.session.search_steps
    assert keeps(trainer.model)


def test_stopping_early_in_the_search_gives_a_frozen_model(build: Callable[..., Any]) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 4}
    stop = transformers.EarlyStoppingCallback(1, early_stopping_threshold=1000.0)
    trainer = build(**best, save_strategy="steps", save_steps=4, given={"callbacks": [stop]})
    callback = quantize(trainer, BUDGET)
    trainer.train()
    assert callback.session.steps == 8
    assert keeps(trainer.model)


def test_a_weight_average_of_the_user_crosses_the_freeze(build: Callable[..., Any]) -> None:
    class Average(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            self.average = WeightAverage(model, 0.9)

        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            self.average.update(model)

        def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            self.average.copy_to_(model)

    trainer = build(given={"callbacks": [Average()]})
    quantize(trainer, BUDGET)
    trainer.train()
    assert keeps(trainer.model)


# ---------------------------------------------------------------------- what cannot work


def test_trainers_that_cannot_work_are_refused(build: Callable[..., Any]) -> None:
    trainer = build()
    quantize(trainer, BUDGET)
    with pytest.raises(OrderError, match="expected one NipqCallback, found 2"):
        quantize(trainer, BUDGET)
    trainer = build()
    trainer.model_wrapped = nn.Sequential(trainer.model)
    with pytest.raises(
        OrderError, match=r"BertForSequenceClassification: expected a model that the trainer has not wrapped"
    ):
        quantize(trainer, BUDGET)
    with pytest.raises(ConfigError, match="restore_callback_states_from_checkpoint=False, found True"):
        quantize(build(restore_callback_states_from_checkpoint=True), BUDGET)
    trainer = build()
    trainer.model_init = bert
    with pytest.raises(ConfigError, match="expected a model, found model_init"):
        quantize(trainer, BUDGET)


def test_an_optimizer_from_before_is_refused_by_name(build: Callable[..., Any]) -> None:
    model = bert()
    early = torch.optim.AdamW(model.parameters())
    with pytest.raises(OrderError, match=r"it lacks .*alpha_raw"):
        quantize(build(model, given={"optimizers": (early, None)}), BUDGET)


def test_an_optimizer_with_groups_of_its_own_is_refused(build: Callable[..., Any]) -> None:
    trainer = build(given={"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.1, "params": []})})
    quantize(trainer, BUDGET)
    with pytest.raises(ConfigError, match="expected an optimizer that takes parameter groups, found AdamW"):
        trainer.train()


def test_a_checkpoint_of_a_float_trainer_is_refused(build: Callable[..., Any], tmp_path: Path) -> None:
    build(save_strategy="steps", save_steps=5, max_steps=5).train()
    trainer = build()
    quantize(trainer, BUDGET)
    with pytest.raises(Exception, match=r"quantize|parameter group") as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert isinstance(error.value, ValueError)


def test_calibration_leaves_no_loader_open(build: Callable[..., Any]) -> None:
    for batches in (2, 100):
        trainer = build()
        state = trainer.accelerator.gradient_state
        before = len(state.dataloader_references)
        quantize(trainer, BUDGET, calibration_batches=batches)
        assert len(state.dataloader_references) == before


def test_rules_of_a_config_hold(build: Callable[..., Any]) -> None:
    trainer = build(max_steps=4)
    quantize(trainer, AverageBits(weights=4), config=Config(weight_bits={2, 4}), finetune=0.5)
    trainer.train()
    weights = [q for q in quantizers(trainer.model) if q.role == "weight" and q.name.startswith("bert.encoder")]
    assert {q.bits_rounded for q in weights} <= {2, 4}
