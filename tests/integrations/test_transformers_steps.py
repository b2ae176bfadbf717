"""One step of transformers' Trainer: penalty, accumulation, clipping, half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from nipq.prepare.layer_table import quantizers
from tests.integrations.tiny_bert import BUDGET, keeps

transformers = pytest.importorskip("transformers")
quantized = pytest.importorskip("nipq.integrations.transformers")
Trainer, quantize = transformers.Trainer, partial(quantized.quantize, finetune=0.3)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def bit_gradients(build: Callable[..., Any], *, given: dict[str, Any] | None = None, **arguments: Any) -> torch.Tensor:
    """Of the penalty alone, in the first step of the optimizer; the loss is taken out."""

    class Silent(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 0.0 * super().compute_loss(*args, **kwargs)

    found = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            found.append([float(q.bit_raw.grad) for q in quantizers(model) if not q.is_frozen])
            control.should_training_stop = True

    given = {"callbacks": [Watch()]} | (given or {})
    trainer = build(kind=Silent, given=given, max_grad_norm=0.0, **arguments)
    quantize(trainer, BUDGET, allocation=None)  # from the middle of the range, far from the budget
    trainer.train()
    assert all(gradient > 0 for gradient in found[0])
    return torch.tensor(found[0])


def test_accumulated_batches_make_one_step_of_the_session(build: Callable[..., Any]) -> None:
    trainer = build(gradient_accumulation_steps=2)
    callback = quantize(trainer, BUDGET)
    trainer.train()
    assert (callback.session.stage, callback.session.steps, callback.session.total_steps) == ("done", 12, 12)
    assert keeps(trainer.model)


def test_float16_and_a_step_that_the_scaler_skipped(build: Callable[..., Any]) -> None:
    """The trainer has float16 for accelerators only; what it would set there is set by hand."""
    seen = set()

    class Overflow(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.float16):
                loss, outputs = super().compute_loss(model, inputs, **kwargs | {"return_outputs": True})
            seen.add(outputs["logits"].dtype)
            return loss * (float("inf") if self.state.global_step == 3 else 1)

    trainer = build(kind=Overflow, max_grad_norm=0.5, optim="adamw_torch")  # not the fused one: see the page
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    callback = quantize(trainer, BUDGET)
    trainer.train()
    assert seen == {torch.float16}
    assert trainer.accelerator.scaler.get_scale() == 512.0
    assert (trainer.state.global_step, callback.session.steps) == (24, 23)
    assert {q.alpha_raw.dtype for q in quantizers(trainer.model)} == {torch.float32}
    assert keeps(trainer.model)


def mean_over_all(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("loss", [None, mean_over_all])
def test_the_penalty_is_the_same_however_many_batches_are_accumulated(build: Callable[..., Any], loss: Any) -> None:
    """Also where the loss is one mean over all micro-batches, which the trainer does not divide."""
    given = {"compute_loss_func": loss}
    one, three = (bit_gradients(build, given=given, gradient_accumulation_steps=count, max_steps=6) for count in (1, 3))
    torch.testing.assert_close(three, one)


def test_clipping_does_not_see_the_bits(build: Callable[..., Any]) -> None:
    norms = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            bits = [q.bit_raw.grad for q in quantizers(model) if not q.is_frozen]
            others = [
                p.grad for name, p in model.named_parameters() if not name.endswith("bit_raw") and p.grad is not None
            ]
            norms.append([float(torch.stack([g.norm() for g in part]).norm()) for part in (bits, others)])
            control.should_training_stop = True

    trainer = build(given={"callbacks": [Watch()]}, max_grad_norm=1e-5)
    quantize(trainer, BUDGET, allocation=None)  # far from the budget, so that bits have a price
    trainer.train()
    assert norms[0][0] > 2e-5
    assert norms[0][1] < 1.001e-5


def test_bf16_smoothed_labels_and_clipping(build: Callable[..., Any]) -> None:
    trainer = build(bf16=True, label_smoothing_factor=0.1, max_grad_norm=0.5)
    quantize(trainer, BUDGET)
    trainer.train()
    assert {q.alpha_raw.dtype for q in quantizers(trainer.model)} == {torch.float32}
    assert keeps(trainer.model)
