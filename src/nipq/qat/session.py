"""The QAT session: calibration, first bits, search, freeze within the budget, fine-tuning, in any training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from nipq.budget.allocate import Method, allocate_bits_
from nipq.budget.bit_table import BitTable
from nipq.budget.budget import Budget, check_feasible
from nipq.budget.freeze import check_same_freeze, freeze_bits_, freeze_to_
from nipq.budget.sensitivity import LossFn
from nipq.config import Phase
from nipq.distributed import check_same_, inner, is_sharded
from nipq.distributed.fsdp import check_wrapper, waits_for_all
from nipq.errors import ConfigError, OrderError
from nipq.prepare.batches import Inputs, check_rereadable
from nipq.prepare.layer_table import check_finite, layer_table, quantizers, set_noise_mix_, set_phase_
from nipq.qat.batchnorm import BatchNormUpdate, reestimate_bn_
from nipq.qat.calibrate import calibrate_
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import (
    check_decay_of_ranges,
    check_float32,
    check_learned,
    check_optimizer,
    drop_frozen_,
    drop_frozen_on_load_,
    scale_rates_,
)
from nipq.qat.oscillation import Oscillations
from nipq.qat.schedule import Schedule, check_rates, check_schedule, cosine, resume_, schedulers
from nipq.qat.search import Search
from nipq.qat.settings import Allocation, NoiseMix, check_model, check_settings

StageName: TypeAlias = Literal["search", "finetune", "done"]

#: Measurements of sensitivity for bit-widths that stay, each at the bits that the one before chose. A third brought
#: nothing more.
SENSITIVITY_ROUNDS = 2

#: Between two looks whether parameters are finite, in optimizer steps.
CHECK_EVERY = 50

logger = logging.getLogger(__name__)


class QATSession:
    """Quantization-aware training of a prepared model under a budget: the one driver of the method.

    ::

        nipq.prepare_(model, example_inputs)
        optimizer = torch.optim.SGD(nipq.param_groups(model), lr=0.02, momentum=0.9)
        session = nipq.QATSession(model, budget, total_steps, loader=loader, loss_fn=criterion, optimizer=optimizer)
        for x, y in batches:
            loss = criterion(model(x), y) + session.penalty()
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            session.step()
        session.finish()

    - When it is built, clipping ranges are calibrated, the first bit-widths are allocated at the budget by noise
      sensitivity, and ranges are calibrated again at these bit-widths. A model that is calibrated already (a loaded
      checkpoint, or ``calibrate_`` and ``allocate_bits_`` called by hand) keeps its ranges and bit-widths.
    - ``search``: pseudo-quantization noise; weights, ranges and bit-widths are learned, and the penalty of
      :class:`~nipq.qat.search.Search` holds the bit-widths at the budget.
    - At its end bit-widths are frozen to whole numbers within the budget, rounding with the straight-through estimator
      (fake quantization) replaces noise, batch-norm statistics are re-estimated, and the bits leave the optimizer.
    - ``finetune``: training of weights and ranges with true rounding.
    - ``done`` after :meth:`finish`, at any time: a loop that stops early has a model within the budget, too.

    :meth:`step` counts steps that the optimizer really made. A call without one does nothing, be it that gradients
    accumulate or that a ``GradScaler`` skipped a step for an overflow. (Fused optimizers skip in their kernel, which
    cannot be seen from outside. Such a step counts; the model has not moved, so the same cost is measured once more.)

    Args:
        model: a prepared model in float32; may be wrapped (DDP, compiled, FSDP2) after it was prepared.
        budget: the limits; None where every bit-width is fixed by the config.
        total_steps: optimizer steps of search and fine-tuning together. More may follow, at the rate that the schedule
            ends with, which is 0 for the cosine.
        loader: batches, read anew from the start for calibration, allocation and batch norms: tensors, ``(inputs,
            targets)`` or mappings of keyword inputs. Needed unless the model is calibrated and has no batch norms.
        loss_fn: loss of outputs and targets, by which the first bit-widths are allocated. Without it the distance of
            the outputs from the float model's own is used, and no targets are needed.
        optimizer: the optimizer, or all of them, built after ``prepare_`` (see :func:`nipq.param_groups`). Without one
            every call of :meth:`step` counts, and dropping frozen bits is up to the caller.
        finetune: share of ``total_steps`` that comes after the freeze, 0 to 1.
        schedule: of all learning rates: ``"cosine"`` (:func:`nipq.qat.schedule.cosine`), a function of the number of
            steps that returns a factor, or None to leave learning rates to the caller.
        allocation: where the first bit-widths come from, see :func:`nipq.allocate_bits_`. ``"noise"``: they are
            learned from there on. ``"sensitivity"``: likewise, measured again at the bits chosen first, and frozen at
            once. ``"hawq"``, ``"uniform"``: they are frozen at once, too. None: learned, from the middle of
            their range.
        calibration_batches: batches read for clipping ranges; 0 starts nothing, for a model that loads a checkpoint
            after the session was built.
        allocation_batches: batches read for the allocation.
        batchnorm_batches: batches read for each re-estimation of batch norms; 0 leaves the statistics of training.
        finetune_phase: ``"round"``, or ``"noise"`` to fine-tune with the method's own noise.
        noise_mix: how the share of the true rounding error in the noise rises during the search, from 0 to 1.
        penalty: of the search, see :class:`~nipq.qat.search.Search`.
        ramp: of the search.
        ema_decay: decay of an exponential moving average (EMA) of the weights, which becomes the model at the end of
            the search and at the end of training; None for no average.
        oscillation: arguments of :class:`~nipq.qat.oscillation.Oscillations` (``dampen``, ``freeze``), or None.
        seed: of the allocation's noise.
        on_state: called with the name of each finished state of the model, when the model is in it: ``"calibrated"``,
            ``"frozen"``, ``"bn"``, ``"finetuned"``.
        inputs: function from a batch of ``loader`` to what the model is called with, where the form of ``prepare_``'s
            example inputs does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Attributes:
        stage: ``"search"``, ``"finetune"`` or ``"done"``.
        steps: optimizer steps so far.
        bits: bit-width of each tensor by its name once frozen, else None.
        search: the search for bit-widths, or None when there is nothing to learn.
        oscillations: the watch over oscillating weights, or None.
        sensitivity: loss that the noise of each tensor adds, measured by the allocation; None without one.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget.
        OrderError: if the model is not prepared, an optimizer or DDP wrapper was built before it was, or the optimizer
            has a learning-rate scheduler and ``schedule`` is not None.
        ConfigError: if a setting is out of range, quantizers are in half precision, or a loader is missing.
        DistributedError: if ranks hold different models, or sharding left quantizers to their rank.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | None,
        total_steps: int,
        *,
        loader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        finetune: float = 0.5,
        schedule: Schedule = "cosine",
        allocation: Allocation = "noise",
        calibration_batches: int = 8,
        allocation_batches: int = 32,
        batchnorm_batches: int = 32,
        finetune_phase: Literal["round", "noise"] = "round",
        noise_mix: NoiseMix = "none",
        penalty: Literal["controller", "paper"] = "controller",
        ramp: float = 0.5,
        ema_decay: float | None = None,
        oscillation: Mapping[str, Any] | None = None,
        seed: int = 0,
        on_state: Callable[[str], None] | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self._optimizers = _listed(optimizer)
        check_model(model, budget, self._optimizers)
        check_settings(
            total_steps=total_steps, finetune=finetune, finetune_phase=finetune_phase, noise_mix=noise_mix,
            penalty=penalty, allocation=allocation, ramp=ramp, ema_decay=ema_decay, oscillation=oscillation, seed=seed,
            counts={
                "calibration_batches": (calibration_batches, 0),
                "allocation_batches": (allocation_batches, 1),
                "batchnorm_batches": (batchnorm_batches, 0),
            },
            functions={"loss_fn": loss_fn, "on_state": on_state, "inputs": inputs},
        )  # fmt: skip
        self.model, self.budget = inner(model), budget
        check_float32(self.model)
        check_wrapper(model)
        check_same_(self.model, "QATSession")
        if self._optimizers:
            check_learned(self.model)
            check_optimizer(self.model, *self._optimizers)
            check_decay_of_ranges(self.model, *self._optimizers)
        check_schedule(schedule, self._optimizers)
        if budget is not None:
            check_feasible(self.model, budget)
            check_same_freeze(self.model, budget.limits(self.model))
        has_batchnorm = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in self.model.modules())
        self._loader, self._inputs, self._batches = loader, inputs, batchnorm_batches if has_batchnorm else 0
        starts = calibration_batches > 0 and not is_calibrated(self.model)
        self._check_loader(starts=starts)
        self.total_steps, self.finetune, self.noise_mix, self.finetune_phase = (
            total_steps, finetune, noise_mix, finetune_phase
        )  # fmt: skip
        self.stage: StageName = "search"
        self.steps = 0
        self.bits: dict[str, int] | None = None
        self._tell = on_state or (lambda _name: None)
        self._copies: list[nn.Module] = []
        self._costs: dict[str, float] = {}
        self._attach = waits_for_all(model)
        self._stepped = not self._optimizers
        self._hooks: list[RemovableHandle] = []
        self._measured: BatchNormUpdate | None = None
        self._evaluated = False
        self._schedule = schedule
        self._quantizers = quantizers(self.model)
        # Of all of these DDP waits for a gradient, of those that the allocation freezes, too.
        self._former = list(dict.fromkeys(q.bit_raw for q in self._quantizers if not q.is_frozen))
        self.sensitivity: dict[str, float] | None = None
        if starts:
            assert loader is not None  # checked above
            self.sensitivity = calibrate_and_allocate_(
                self.model, loader, budget, loss_fn, allocation=allocation, calibration_batches=calibration_batches,
                allocation_batches=allocation_batches, seed=seed, inputs=inputs,
            )  # fmt: skip
        self._tell("calibrated")
        scale_rates_(*self._optimizers)
        self._schedulers = schedulers(schedule, self._optimizers, total_steps)
        for one in self._optimizers:
            drop_frozen_(one, self.model)  # bits that the allocation froze
            self._hooks += [one.register_step_post_hook(self._note_step), drop_frozen_on_load_(one, self.model)]
        learned = any(not quantizer.is_frozen for quantizer in self._quantizers)
        self.search: Search | None = None
        if budget is not None and learned and self.search_steps:
            self.search = Search(self.model, budget, self.search_steps, penalty=penalty, ramp=ramp)
        self._limits = {} if budget is None else {x.name: float(x.target) for x in budget.limits(self.model)}
        self.oscillations = None if oscillation is None else Oscillations(self.model, total_steps, **oscillation)
        self._ema = None if ema_decay is None else WeightAverage(self.model, ema_decay)
        set_phase_(self.model, Phase.NOISE)
        self._mix_noise()
        if not self.search_steps:
            self._freeze()

    @property
    def search_steps(self) -> int:
        """Optimizer steps before the freeze."""
        return self.total_steps - round(self.finetune * self.total_steps)

    @property
    def learned_bits(self) -> list[nn.Parameter]:
        """Bit parameters that are learned now, for gradient clipping to leave them out."""
        own = (q.bit_raw for q in self._quantizers if not q.is_frozen) if self.stage == "search" else ()
        return list(dict.fromkeys(own))

    # ------------------------------------------------------------------ in the loop

    def penalty(self) -> Tensor:
        """The term to add to the loss of every forward, before it is divided or scaled for anything.

        Returns:
            float32, no dimensions. Zero once bits are frozen (unless oscillations are dampened), yet still a function
            of the former bit parameters: ``DistributedDataParallel`` waits for a gradient of every parameter that it
            was built with.

        Raises:
            NonFiniteError: if a bit-width is not finite.
        """
        if self.stage == "search":
            self._evaluated = not any(quantizer.training for quantizer in self._quantizers)
        if self.search is not None:
            term = self.search.penalty()
        else:
            term = torch.zeros((), device=next(self.model.parameters()).device)
            attached = [raw.float() for raw in self._former if self._attach and not is_sharded(raw)]
            if attached:
                term = term + 0 * torch.cat(attached).sum()
        return term if self.oscillations is None else term + self.oscillations.penalty()

    def step(self) -> None:
        """Advance by one step, if the optimizer made one since the last call; see the class about skipped ones.

        Raises:
            OrderError: if the loss of a search was computed in evaluation mode, in which there is no noise; or if a
                learning rate is not what the schedule set, as where the optimizer got another scheduler.
            NonFiniteError: if a parameter is NaN or infinite (looked for once in 50 steps, at the freeze and at the
                end).
        """
        if not self._stepped or self.stage == "done":
            return
        if self.stage == "search" and self._evaluated:
            raise OrderError(
                f"{type(self.model).__name__}: expected training mode when session.penalty() was called, found "
                "evaluation mode, in which quantizers round and nothing learns from noise. Call model.train() before "
                "the loop and after every evaluation."
            )
        check_rates(self._schedulers)
        self._stepped = not self._optimizers
        self.steps += 1
        for scheduler in self._schedulers:
            scheduler.step()
        if self.search is not None:
            self.search.step()
        if self.oscillations is not None:
            self.oscillations.step()
        if self._ema is not None:
            self._ema.update(self.model)
        if self.steps % CHECK_EVERY == 0:
            self._check_finite()
        if self.stage == "search":
            self._mix_noise()
            if self.steps >= self.search_steps:
                self._freeze()

    def finish(self) -> None:
        """End the session: freeze within the budget if that has not happened, re-estimate batch norms, evaluation mode.

        Call it when training ends, early or not; after weights were averaged, if they are. A second call does nothing.
        """
        if self.stage == "done":
            return
        self._check_finite()
        if self.stage == "search":
            self._freeze()
        elif self.steps > self.search_steps:
            if self._ema is not None:
                self._ema.copy_to_(self.model)
            self._reestimate_batchnorm()
            self._tell("finetuned")
        self._end()

    def _check_finite(self) -> None:
        """Refuse weights that a loss of NaN has spoilt; of a sharded model when it is converted."""
        if not any(is_sharded(parameter) for parameter in self.model.parameters()):
            check_finite(self.model, f"QATSession, step {self.steps}: ")

    def _end(self) -> None:
        self.stage, self._ema = "done", None
        set_phase_(self.model, Phase.ROUND)
        self.model.eval()
        self.close()

    def close(self) -> None:
        """Remove the hooks from the optimizers, for a loop that ends without :meth:`finish`."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its moving average in it, for evaluation; the model itself where there is no average.

        Yields:
            The model.
        """
        if self._ema is None:
            yield self.model
            return
        with self._ema.swapped(self.model):
            yield self.model

    def follow(self, copy: nn.Module) -> None:
        """Freeze a copy of the model along with it, at the same bits, such as torch's ``AveragedModel``.

        ``AveragedModel`` pairs parameters by their order, so both have to lose the bits at once; and it averages whole
        numbers in a way that turns 3 bits into 2, so from the freeze on its buffers are copies of the model's.
        ``ema_decay`` needs no such call.

        Args:
            copy: made of the prepared model.
        """
        self._copies.append(copy)
        if self.bits is not None:
            self._freeze_copy(copy, list(self.bits.values()))

    def logs(self) -> dict[str, float]:
        """Numbers for a logger (reads values: not for every step on a GPU).

        Returns:
            ``nipq/step``; ``nipq/frozen``, 0 or 1; for each limit its present cost, such as
            ``nipq/average_weight_bits``; while searching also ``..._soft``, that of the continuous bit-widths.
        """
        found = {"nipq/step": float(self.steps), "nipq/frozen": float(self.bits is not None)} | self._costs
        for name, numbers in ({} if self.search is None else self.search.distance()).items():
            found |= {_key(name): float(numbers["rounded"]), f"{_key(name)}_soft": float(numbers["soft"])}
        return found

    # ------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Everything but model and optimizer: plain numbers and strings; tensors of EMA and oscillations, if any."""
        search = None if self.search is None else self.search.state_dict()
        if search is not None:
            search["controller"] = {name: tensor.tolist() for name, tensor in search["controller"].items()}
        state = {
            "stage": self.stage,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "finetune": self.finetune,
            "limits": self._limits,
            "bits": None if self.bits is None else dict(self.bits),
            "sensitivity": self.sensitivity,
            "search": search,
        }
        if self._ema is not None:
            state["ema"] = self._ema.state_dict()
        if self.oscillations is not None:
            state["oscillations"] = self.oscillations.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another session stopped, across the freeze, too.

        Load the model's state before the session is built, so that it is not calibrated again, and before the
        optimizer's. The session's state may come at any place after that.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ConfigError: if it is of another model, budget or setting.
            OrderError: if it is of a search, and this session is past its own.
        """
        if state["bits"] is None and self.bits is not None:
            raise OrderError(
                "QATSession: expected the state of a session after its freeze, as this one's, found one from its "
                "search. Build model and session afresh and load it there."
            )
        if state["limits"] != self._limits:
            found = f"expected a state with limits {self._limits}, found {state['limits']}"
            raise ConfigError(f"QATSession: {found}. Build it with the same budget.")
        for name, own in (("ema", self._ema), ("oscillations", self.oscillations)):
            if (own is None) != (name not in state) and state["stage"] != "done":
                raise ConfigError(
                    f"QATSession: expected a state {'without' if own is None else 'with'} {name}, as this session's, "
                    "found another. Build it with the same settings."
                )
        if state["bits"] is not None and self.bits != state["bits"]:
            self._freeze_to(state["bits"])
        if self.steps == 0 and self._measured is not None and self._measured.is_current():
            self._measured.undo()  # a model in fine-tuning was loaded, and the freeze at step 0 measured it anew
        if self.search is not None and state["search"] is not None:
            controller = {n: torch.tensor(v, dtype=torch.float64) for n, v in state["search"]["controller"].items()}
            self.search.load_state_dict(state["search"] | {"controller": controller})
        if self._ema is not None and "ema" in state:
            self._ema.load_state_dict(state["ema"])
        if self.oscillations is not None and "oscillations" in state:
            self.oscillations.load_state_dict(state["oscillations"])
        self.total_steps, self.finetune, self.sensitivity = (
            state["total_steps"], state["finetune"], state["sensitivity"]
        )  # fmt: skip
        self.stage, self.steps = state["stage"], state["steps"]
        resume_(self._schedulers, self.steps, cosine(self.total_steps) if self._schedule == "cosine" else None)
        if self.stage == "search":
            self._mix_noise()
        if self.stage == "done":
            self._end()

    # ------------------------------------------------------------------ the freeze

    def _freeze(self) -> None:
        if self._ema is not None:
            self._ema.copy_to_(self.model)
        self._settle(freeze_bits_(self.model, self.budget).bits)
        self._tell("frozen")
        if self._reestimate_batchnorm():
            self._tell("bn")
        if self._ema is not None:
            self._ema = WeightAverage(self.model, self._ema.decay)

    def _freeze_to(self, bits: dict[str, int]) -> None:
        """Freeze at the bits of a saved session."""
        names = [quantizer.name for quantizer in BitTable(layer_table(self.model)).quantizers]
        if set(names) != set(bits):
            other = min(set(names) ^ set(bits))
            raise ConfigError(
                f"QATSession: expected the state of a model with the same quantized tensors, found a difference: "
                f"{other}. Prepare the model with the config that it was trained with."
            )
        bits = {name: bits[name] for name in names}  # files may have sorted them
        freeze_to_(self.model, list(bits.values()), [] if self.budget is None else self.budget.limits(self.model))
        self._settle(bits)
        if self._ema is not None:
            self._ema = WeightAverage(self.model, self._ema.decay)

    def _settle(self, bits: dict[str, int]) -> None:
        """Everything that follows from frozen bits: phase, optimizers, copies, costs."""
        self.bits, self.search, self.stage = dict(bits), None, "finetune"
        set_phase_(self.model, Phase(self.finetune_phase))
        if self.noise_mix != "none":
            set_noise_mix_(self.model, 1.0)
        for raw in self._former:
            raw.grad = None
        for optimizer in self._optimizers:
            drop_frozen_(optimizer, self.model)
        for copy in self._copies:
            self._freeze_copy(copy, list(bits.values()))
        if self.budget is not None:
            table, widths = BitTable(layer_table(self.model)), list(bits.values())
            whole = widths[: len(table.weights)], widths[len(table.weights) :]
            self._costs = {_key(x.name): float(x.exact_cost(*whole)) for x in self.budget.limits(self.model)}

    def _freeze_copy(self, copy: nn.Module, bits: list[int]) -> None:
        freeze_to_(copy, bits)
        set_phase_(copy, Phase(self.finetune_phase))
        if isinstance(copy, AveragedModel):
            copy.use_buffers = False

    def _reestimate_batchnorm(self) -> bool:
        measures = self._batches > 0 and is_calibrated(self.model)  # else a checkpoint is loaded later
        if measures:
            assert self._loader is not None
            self._measured = reestimate_bn_(self.model, self._loader, self._batches, inputs=self._inputs)
        return measures

    def _mix_noise(self) -> None:
        """Raise the share of the true rounding error from 0 at the first step of the search to 1 at its last."""
        if self.noise_mix == "none":
            return
        passed = min(1.0, self.steps / max(1, self.search_steps - 1))
        rise = passed if self.noise_mix == "linear" else 0.5 - 0.5 * float(torch.cos(torch.tensor(torch.pi * passed)))
        set_noise_mix_(self.model, rise)

    def _note_step(self, *_: object) -> None:
        self._stepped = True

    def _check_loader(self, *, starts: bool) -> None:
        """Refuse a missing loader, or one that can be read once only."""
        if self._loader is None and (self._batches or starts):
            raise ConfigError(
                f"{type(self.model).__name__}: expected a loader to calibrate the model and to re-estimate its batch "
                "norms, found none. Give loader=...; a calibrated model needs none with batchnorm_batches=0."
            )
        check_rereadable(self._loader, "QATSession")


def calibrate_and_allocate_(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Budget | None,
    loss_fn: LossFn | None = None,
    *,
    allocation: Allocation = "noise",
    calibration_batches: int = 8,
    allocation_batches: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> dict[str, float] | None:
    """Calibrate clipping ranges, allocate the first bit-widths, and calibrate again at these bit-widths.

    Args:
        model: a prepared model, not sharded.
        loader: batches, read several times from the start.
        budget: the limits; without any, or where all bit-widths are fixed, ranges are calibrated only.
        loss_fn: of outputs and targets; without it the distance from the float model's outputs.
        allocation: see :class:`QATSession`.
        calibration_batches: batches read for ranges.
        allocation_batches: batches read for the allocation.
        seed: of its noise.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        Loss that the noise of each tensor adds, by its name; None where nothing was allocated.

    Raises:
        OrderError: if the model is sharded.
        As :func:`nipq.calibrate_` and :func:`nipq.allocate_bits_`.
    """
    learned = any(not quantizer.is_frozen for quantizer in quantizers(model))
    allocates = budget is not None and learned and allocation is not None
    if allocates and any(is_sharded(parameter) for parameter in model.parameters()):
        raise OrderError(
            f"{type(model).__name__}: expected bit-widths to be allocated before the model is sharded, found a sharded "
            "model that is not calibrated. Call nipq.qat.session.calibrate_and_allocate_ before fully_shard."
        )
    if allocates:
        check_rereadable(loader, "calibrate_and_allocate_")
    calibrate_(model, loader, calibration_batches, inputs=inputs)
    if not allocates:
        return None
    assert budget is not None
    fixed = allocation == "sensitivity"
    method: Method = "noise" if allocation is None or allocation == "sensitivity" else allocation
    losses: dict[str, float] = {}
    for _ in range(SENSITIVITY_ROUNDS if fixed else 1):
        losses = allocate_bits_(
            model, loader, budget, loss_fn, method=method, batches=allocation_batches, seed=seed, whole=fixed,
            inputs=inputs,
        )  # fmt: skip
        calibrate_(model, loader, calibration_batches, inputs=inputs)
    if fixed:
        chosen = [quantizer.bits_rounded for quantizer in BitTable(layer_table(model)).quantizers]
        freeze_to_(model, chosen, budget.limits(model))
        calibrate_(model, loader, calibration_batches, inputs=inputs)  # balanced grids of 8 bits are symmetric now
    return losses


def is_calibrated(model: nn.Module) -> bool:
    """Return whether every clipping range of a prepared model was calibrated."""
    return all(quantizer.calibrated for quantizer in quantizers(model))


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]


def _key(limit: str) -> str:
    return f"nipq/{limit.replace(' ', '_')}"
