"""The stages of NIPQ inside a training loop that somebody else owns: search, freeze within the budget, fine-tune."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from nipq.budget.bit_table import BitTable
from nipq.budget.budget import Budget
from nipq.budget.freeze import freeze_bits_, freeze_to_
from nipq.config import Phase
from nipq.distributed import check_same_, is_sharded
from nipq.distributed.fsdp import check_wrapper, unwrapped, waits_for_all
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import layer_table, quantizers, set_phase_
from nipq.qat.batchnorm import reestimate_bn_
from nipq.qat.optim import check_float32, check_optimizer, drop_frozen_, drop_frozen_on_load_
from nipq.qat.search import Search

StageName: TypeAlias = Literal["search", "finetune", "done"]

logger = logging.getLogger(__name__)


class Course:
    """Takes a prepared model through search, freeze, fine-tune and finish, a step behind each step of the optimizer.

    ::

        course = nipq.Course(model, budget, total_steps, optimizer=optimizer, loader=loader)
        for x, y in batches:
            loss = criterion(model(x), y) + course.penalty()
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            course.step()
        course.finish()

    - ``search``: noise, bits learned, the penalty of :class:`~nipq.qat.search.Search`.
    - At its end bits are frozen within the budget, rounding replaces noise, batch-norm statistics are measured anew,
      and the bits leave the optimizer, whose other state and whose groups stay.
    - ``finetune``: training with true rounding.
    - ``done`` after :meth:`finish`, at any time: a loop that stops early has a model within the budget, too.

    :meth:`step` goes by steps that the optimizer really made. A call without one does nothing, be it that gradients
    accumulate or that a ``GradScaler`` skipped a step for an overflow. (Fused optimizers skip in their kernel, which
    nobody sees. Such a step counts; the model has not moved, so the search measures the same cost once more.)

    Args:
        model: a prepared, calibrated model in float32; may be wrapped (DDP, compiled) after it was prepared.
        budget: the limits.
        total_steps: optimizer steps of search and fine-tuning together. More may follow.
        optimizer: the optimizer, or all of them, built after ``prepare_`` (see :func:`nipq.param_groups`). Without one
            every call of :meth:`step` counts, and dropping frozen bits is up to the caller.
        finetune: share of ``total_steps`` that comes after the freeze, 0 to below 1.
        loader: batches for the statistics of batch norms, see :func:`nipq.prepare.batches.inputs_of`; one of its own, as
            reading it must not disturb the loop's. Only models with batch norms need it.
        batchnorm_batches: how many of them to read; 0 leaves statistics as training left them.
        penalty: of the search.
        ramp: of the search.

    Attributes:
        stage: ``"search"``, ``"finetune"`` or ``"done"``.
        steps: optimizer steps so far.
        bits: bit-width of each tensor by its name once frozen, else None.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget.
        OrderError: if the model is not prepared, or an optimizer or DDP wrapper was built before it was.
        ConfigError: if a setting is out of range, quantizers are in half precision, or a loader is missing.
        DistributedError: if ranks hold different models, or sharding left quantizers to their rank.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        total_steps: int,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        finetune: float = 0.3,
        loader: Iterable[Any] | None = None,
        batchnorm_batches: int = 32,
        penalty: Literal["controller", "paper"] = "controller",
        ramp: float = 0.5,
    ) -> None:
        if not 0 <= finetune < 1:
            raise ConfigError(f"Course: expected finetune from 0 to below 1, a share of total_steps; found {finetune}.")
        self.model, self.budget = unwrapped(model), budget
        check_float32(self.model)
        check_wrapper(model)
        check_same_(self.model, "Course")
        has_batchnorm = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in self.model.modules())
        self._loader, self._batches = loader, batchnorm_batches if has_batchnorm else 0
        if self._batches and loader is None:
            raise ConfigError(
                f"{type(self.model).__name__}: expected a loader to measure its batch norms with after the freeze, "
                "found none. Give loader=..., or batchnorm_batches=0 to keep the statistics of training."
            )
        self._optimizers = _listed(optimizer)
        if self._optimizers:
            check_optimizer(self.model, *self._optimizers)
        self.total_steps, self.finetune = total_steps, finetune
        self._search: Search | None = Search(self.model, budget, self.search_steps, penalty=penalty, ramp=ramp)
        self.stage: StageName = "search"
        self.steps = 0
        self.bits: dict[str, int] | None = None
        self._former = [q.bit_raw for q in quantizers(self.model) if not q.is_frozen]
        self._attach = waits_for_all(model)
        self._limits = {limit.name: float(limit.target) for limit in budget.limits(self.model)}
        self._costs: dict[str, float] = {}
        self._copies: list[nn.Module] = []
        self._stepped = not self._optimizers
        self._hooks: list[RemovableHandle] = []
        for one in self._optimizers:
            self._hooks += [one.register_step_post_hook(self._note_step), drop_frozen_on_load_(one, self.model)]

    @property
    def search_steps(self) -> int:
        """Optimizer steps before the freeze."""
        return self.total_steps - round(self.finetune * self.total_steps)

    @property
    def learned_bits(self) -> list[nn.Parameter]:
        """Bit parameters that are learned now, for clipping to leave them out."""
        return [] if self._search is None else self._former

    # ------------------------------------------------------------------ in the loop

    def penalty(self) -> Tensor:
        """The term to add to the loss of every forward, before it is divided or scaled for anything.

        Returns:
            float32, no dimensions. Zero once bits are frozen, yet still a function of the former bit parameters:
            ``DistributedDataParallel`` waits for a gradient of every parameter that it was built with.

        Raises:
            NonFiniteError: if a bit-width is not finite.
        """
        if self._search is not None:
            return self._search.penalty()
        zero = torch.zeros((), device=next(self.model.parameters()).device)
        attached = [raw.float() for raw in self._former if self._attach and not is_sharded(raw)]
        return zero + 0 * torch.cat(attached).sum() if attached else zero

    def step(self) -> None:
        """Go on by one step, if the optimizer made one since the last call; see the class about skipped ones."""
        if not self._stepped or self.stage == "done":
            return
        self._stepped = not self._optimizers
        self.steps += 1
        if self._search is not None:
            self._search.step()
            if self.steps >= self.search_steps:
                self._freeze()

    def finish(self) -> None:
        """End the course: freeze within the budget, if that has not happened, and measure batch norms a last time.

        Call it when training ends, early or not; after weights were averaged, if they are. A second call does nothing.
        """
        {"search": self._freeze, "finetune": self._measure_batchnorm, "done": self.close}[self.stage]()
        self.stage = "done"
        self.close()

    def close(self) -> None:
        """Let go of the optimizers, for a loop that ends without :meth:`finish`."""
        while self._hooks:
            self._hooks.pop().remove()

    def follow(self, copy: nn.Module) -> None:
        """Freeze a copy of the model along with it, at the same bits, such as torch's ``AveragedModel``.

        ``AveragedModel`` pairs parameters by their order, so both have to lose the bits at once; and it averages whole
        numbers in a way that turns 3 bits into 2, so from the freeze on its buffers are copies of the model's.
        ``nipq.WeightAverage`` needs no such call.

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
        for name, numbers in ({} if self._search is None else self._search.distance()).items():
            found |= {_key(name): float(numbers["rounded"]), f"{_key(name)}_soft": float(numbers["soft"])}
        return found

    # ------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Where the course is, in plain numbers and strings (JSON holds them exactly)."""
        search = None if self._search is None else self._search.state_dict()
        if search is not None:
            search["controller"] = {name: tensor.tolist() for name, tensor in search["controller"].items()}
        return {
            "stage": self.stage,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "finetune": self.finetune,
            "limits": self._limits,
            "bits": None if self.bits is None else dict(self.bits),
            "search": search,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another course stopped, across the freeze, too.

        Load the model's state before the optimizer's, as everybody does; the course's may come at any place.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ConfigError: if it is of another model or budget.
            OrderError: if it is of a search, and this course is past its own.
        """
        if state["bits"] is None and self.bits is not None:
            raise OrderError(
                "Course: expected the state of a course after its freeze, as this one's, found one from its search. "
                "Build model and course afresh and load it there."
            )
        if state["limits"] != self._limits:
            found = f"expected a state with limits {self._limits}, found {state['limits']}"
            raise ConfigError(f"Course: {found}. Build it with the same budget.")
        if state["bits"] is not None:
            self._freeze_to(state["bits"])
        if self._search is not None and state["search"] is not None:
            controller = {n: torch.tensor(v, dtype=torch.float64) for n, v in state["search"]["controller"].items()}
            self._search.load_state_dict(state["search"] | {"controller": controller})
        self.total_steps, self.finetune = state["total_steps"], state["finetune"]
        self.stage, self.steps = state["stage"], state["steps"]

    # ------------------------------------------------------------------ the freeze

    def _freeze(self) -> None:
        assignment = freeze_bits_(self.model, self.budget)
        self._settle(assignment.bits)
        self._measure_batchnorm()

    def _freeze_to(self, bits: dict[str, int]) -> None:
        """What another course decided."""
        names = [quantizer.name for quantizer in BitTable(layer_table(self.model)).quantizers]
        if set(names) != set(bits):
            other = min(set(names) ^ set(bits))
            raise ConfigError(
                f"Course: expected the state of a model with the same quantized tensors, found a difference: {other}. "
                "Prepare the model with the config that it was trained with."
            )
        bits = {name: bits[name] for name in names}  # files may have sorted them
        freeze_to_(self.model, list(bits.values()))
        self._settle(bits)

    def _settle(self, bits: dict[str, int]) -> None:
        """All that follows from bits being whole."""
        self.bits, self._search, self.stage = dict(bits), None, "finetune"
        set_phase_(self.model, Phase.ROUND)
        for raw in self._former:
            raw.grad = None
        for optimizer in self._optimizers:
            drop_frozen_(optimizer, self.model)
        for copy in self._copies:
            self._freeze_copy(copy, list(bits.values()))
        table, widths = BitTable(layer_table(self.model)), list(bits.values())
        whole = widths[: len(table.weights)], widths[len(table.weights) :]
        self._costs = {_key(limit.name): float(limit.exact_cost(*whole)) for limit in self.budget.limits(self.model)}

    def _freeze_copy(self, copy: nn.Module, bits: list[int]) -> None:
        freeze_to_(copy, bits)
        set_phase_(copy, Phase.ROUND)
        if isinstance(copy, AveragedModel):
            copy.use_buffers = False

    def _measure_batchnorm(self) -> None:
        if self._batches:
            assert self._loader is not None
            reestimate_bn_(self.model, self._loader, self._batches)

    def _note_step(self, *_: object) -> None:
        self._stepped = True


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _key(limit: str) -> str:
    return f"nipq/{limit.replace(' ', '_')}"
