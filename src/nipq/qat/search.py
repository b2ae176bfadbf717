"""Search for bit-widths under a budget: a penalty whose prices a feedback controller finds while training.

A budget is a constraint, so its penalty has to carry a Lagrange multiplier that is not known beforehand; it differs by
orders of magnitude between networks and optimizers. The controller moves the price of each limit until the cost
follows a reference, which falls along a cosine from the starting cost to the target over the first part of training::

    e      = cost / reference - 1                              relative error
    a      = e + LEAD * total_steps * (smoothed change of e per step)    where e will be in 5 % of training
    u     += clip(a / 0.02, -1, 1) / (0.01 * total_steps)      the memory: an e-fold in price per 1 % of training
    price  = 0.001 * (sinh(u) + cosh(u) * clip(a / 0.03, -4, 4))

sinh makes the memory logarithmic, so any size of price is found in the same time, and lets it cross zero: a ``target``
is also pushed up to from below, while a ``bound`` keeps u and the price at 0 or above. The second summand answers the
present error in proportion to the price. Everything is relative (costs to targets, times to ``total_steps``), so
the size of the model, the unit of the cost and the length of training do not matter.

**Why the look-ahead.** Bits have inertia (momentum, the sigmoid's slope, Adam's averages). Without it the price keeps
growing until the cost has reached its reference, and then overshoots it. On the toy networks of the test, over a wider
grid of which 183 cases can reach their target (300 to 3000 steps, SGD and Adam, constant and cosine rates, losses of
1e-3 to 1 at 4 bits), 77 ended more than 1 % off without it and 8 with it. Six of those are SGD on the steepest loss,
where the average swings by 2 to 7 % at a fixed price, too; the other two end 1.6 % off. The freeze then keeps the
budget.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from torch.optim import Optimizer

from nipq.budget.bit_table import BitTable, Limit
from nipq.budget.budget import Budget, check_feasible
from nipq.distributed import check_same_
from nipq.distributed.fsdp import check_wrapper
from nipq.errors import ConfigError, OrderError
from nipq.functional.cost import cost
from nipq.prepare.layer_table import layer_table
from nipq.qat.optim import check_optimizer

#: Horizon of the extrapolation of an error, and time constant of its slope's average; shares of training.
LEAD, SMOOTHING = 0.05, 0.005
#: Share of training in which a saturated memory multiplies the price by e.
FOLD = 0.01
#: Relative errors at which the memory moves at full speed, and at which the answer to the present doubles the price.
FULL_SPEED, DOUBLING = 0.02, 0.03
#: Largest answer to the present error, in prices; smallest price scale; largest memory (a price of 600).
MOST_ANSWER, SCALE, MOST_MEMORY = 4.0, 1e-3, 14.0


class PriceController:
    """Prices of several limits; all state is tensors of shape (K,), and no value is read back to the host.

    Args:
        start: cost of each limit at the start divided by its target, float64, shape (K,).
        two_sided: whether each limit is a target, approached from both sides, bool, shape (K,).
        total_steps: steps of the whole training, at least 1.
        ramp: share of the steps in which the reference falls to the target, 0 to 1.

    Raises:
        ConfigError: if the length or the ramp is out of range.
    """

    def __init__(self, start: Tensor, two_sided: Tensor, total_steps: int, ramp: float) -> None:
        if total_steps < 1:
            raise ConfigError(
                f"Search: expected total_steps of at least 1, found {total_steps}. Give batches * epochs."
            )
        if not 0 <= ramp <= 1:
            raise ConfigError(f"Search: expected ramp from 0 to 1, a share of total_steps; found {ramp}. Change it.")
        self.total_steps = total_steps
        self.ramp = ramp
        self.two_sided = two_sided
        self.state: dict[str, Tensor] = {
            "step": torch.zeros((), dtype=torch.float64, device=start.device),
            "start": start.detach().clone(),
            "memory": torch.zeros_like(start),
            "error": torch.zeros_like(start),
            "slope": torch.zeros_like(start),
        }

    def to(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        self.two_sided = self.two_sided.to(device)
        self.state = {name: tensor.to(device) for name, tensor in self.state.items()}

    def reference(self) -> Tensor:
        """Cost divided by target that the present step should have, shape (K,)."""
        share = ((self.state["step"] + 1) / max(1.0, self.ramp * self.total_steps)).clamp(max=1)
        return 1 + (self.state["start"] - 1) * (0.5 + 0.5 * torch.cos(torch.pi * share))

    def prices(self, cost: Tensor) -> Tensor:
        """Weight of each limit in the penalty; changes nothing.

        Args:
            cost: present cost divided by target, shape (K,), without gradient.

        Returns:
            Prices, shape (K,); at least 0 for bounds.
        """
        memory = self.state["memory"]
        ahead = cost / self.reference() - 1 + LEAD * self.total_steps * self.state["slope"]
        answer = (ahead / DOUBLING).clamp(-MOST_ANSWER, MOST_ANSWER)
        price = SCALE * (torch.sinh(memory) + torch.cosh(memory) * answer)
        return torch.where(self.two_sided, price, price.clamp(min=0))

    def step(self, cost: Tensor) -> None:
        """Learn from the cost after an optimizer step.

        Args:
            cost: cost divided by target, shape (K,), without gradient.
        """
        state = self.state
        error = cost / self.reference() - 1
        change = torch.where(state["step"] > 0, error - state["error"], torch.zeros_like(error))
        slope = state["slope"] + (change - state["slope"]) * min(1.0, 1 / (SMOOTHING * self.total_steps))
        ahead = error + LEAD * self.total_steps * slope
        memory = state["memory"] + (ahead / FULL_SPEED).clamp(-1, 1) / (FOLD * self.total_steps)
        memory = torch.where(self.two_sided, memory, memory.clamp(min=0)).clamp(-MOST_MEMORY, MOST_MEMORY)
        self.state = {
            "step": state["step"] + 1,
            "start": state["start"],
            "memory": memory,
            "error": error,
            "slope": slope,
        }


#: Off the CPU, looking whether bits are finite waits for the device, so it is done once in so many steps.
CHECK_EVERY = 50
#: Steps after which bit-widths that have not moved at all are an error.
STILL = 20

logger = logging.getLogger(__name__)


class Search:
    """Pulls the learned bit-widths of a model to a budget, from inside any loop.

    ::

        loss = criterion(model(x), y) + search.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        search.step()

    ``penalty="controller"`` adds sum_k price_k * cost_k / target_k with prices found by
    :class:`~nipq.qat.search.PriceController` and costs of the continuous bit-widths, which are the mean of what
    stochastic rounding draws. ``penalty="paper"`` is the published term, with its constants:
    H(sum b N, T sum N) / 2^23 for average bits (and, in bits, for bytes) and 3 H(BOPs / 1e9, T / 1e9) for
    bit-operations, H the Huber function with beta 1, costs of the rounded bit-widths with identity gradient and without
    the stochastic draw; with ``mode="bound"`` only what is above the limit counts. Either way the search comes near
    the budget and ``nipq.freeze_bits_(model, search.budget)`` then keeps it exactly.

    With several ranks nothing is sent: all compute the same prices from the same bit-widths. The model may be wrapped
    before or after; the penalty is added outside of the wrapper.

    Paper: the published penalty without its faults B3 and B4.

    Args:
        model: a prepared model.
        budget: the limits.
        total_steps: how often ``step`` will be called.
        penalty: ``"controller"`` or ``"paper"``.
        ramp: share of ``total_steps`` in which the controller's reference falls from the first cost to the target.
        optimizer: if given, refused unless it holds every parameter of the model.

    Attributes:
        budget: the budget.
        feasible: the possible range of each limit.

    Raises:
        BudgetError: if no allowed bit-widths keep the budget.
        OrderError: if the model is not prepared, or the optimizer or a DDP wrapper was built before it was.
        ConfigError: if a setting is out of range.
        NonFiniteError: if a bit-width is not finite.
        DistributedError: if ranks hold different models, or sharding left quantizers to their rank.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        total_steps: int,
        *,
        penalty: Literal["controller", "paper"] = "controller",
        ramp: float = 0.5,
        optimizer: Optimizer | None = None,
    ) -> None:
        if penalty not in ("controller", "paper"):
            raise ConfigError(f"Search: expected penalty 'controller' or 'paper', found {penalty!r}.")
        self.budget = budget
        self.feasible = check_feasible(model, budget)
        if optimizer is not None:
            check_optimizer(model, optimizer)
        check_wrapper(model)
        check_same_(model, "Search")
        self.kind = penalty
        self._limits = budget.limits(model)
        self._table = BitTable(layer_table(model))
        self._targets = torch.tensor([limit.target for limit in self._limits], dtype=torch.float64)
        bits = self._table.bits().detach()
        self._table.check_finite(bits)
        self._place_on(bits.device)
        two_sided = torch.tensor([limit.mode == "target" for limit in self._limits], device=bits.device)
        self._controller = PriceController(self._relative_costs(bits), two_sided, total_steps, ramp)
        self._calls = 0
        self._first_bits = bits.clone()

    def penalty(self) -> Tensor:
        """The term to add to the loss.

        Returns:
            float32, no dimensions; differentiable in the bit parameters alone.

        Raises:
            OrderError: if bits were frozen since the search was built.
            NonFiniteError: if a bit-width is not finite (looked for at every call on a CPU, else in ``step``).
        """
        bits = self._bits()
        if bits.device.type == "cpu":
            self._table.check_finite(bits.detach())
        if self.kind == "paper":
            rounded = self._table.round(bits)
            return torch.stack([self._published(limit, rounded) for limit in self._limits]).sum().float()
        costs = self._relative_costs(bits)
        return (self._controller.prices(costs.detach()) * costs).sum().float()

    @torch.no_grad()
    def step(self) -> None:
        """Move the schedule and the prices; call it after the optimizer's step.

        Past ``total_steps``, which a warning in the log tells once, the prices go on as at the end.

        Raises:
            OrderError: if the bit-widths get gradients and no optimizer moves them.
            NonFiniteError: if a bit-width is not finite (looked for once in 50 steps off the CPU).
        """
        bits = self._bits()
        if bits.device.type == "cpu" or self._calls % CHECK_EVERY == 0:
            self._table.check_finite(bits)
        self._calls += 1
        if self._calls == min(STILL, self._controller.total_steps):
            self._check_moved(bits)
        if self._calls == self._controller.total_steps + 1:
            logger.warning(
                "Search.step was called more often than total_steps=%d says: freeze the bit-widths, or give the length "
                "of the search",
                self._controller.total_steps,
            )
        self._controller.step(self._relative_costs(bits))

    def _check_moved(self, bits: Tensor) -> None:
        """Refuse an optimizer that was built before the bit-widths existed: they would stay where they are."""
        if not torch.equal(bits, self._first_bits.to(bits.device)):
            return
        raws = [quantizer.bit_raw for quantizer in self._table.quantizers if not quantizer.is_frozen]
        if any(raw.grad is not None and bool(raw.grad.any()) for raw in raws):
            raise OrderError(
                f"Search: expected an optimizer that moves the bit-widths, found them where they were {self._calls} "
                "steps ago, with gradients. Build it from nipq.param_groups(model, lr=...) after nipq.prepare_."
            )

    @torch.no_grad()
    def distance(self) -> dict[str, dict[str, Any]]:
        """Cost and target of each limit (reads values: not for every step on a GPU).

        Returns:
            For each limit's name its ``soft`` cost (of the continuous bit-widths), ``rounded`` cost (which evaluation
            has), ``target``, ``unit``, and ``relative``, that is rounded / target - 1.

        Raises:
            NonFiniteError: if a bit-width is not finite.
        """
        bits = self._bits()
        self._table.check_finite(bits)
        pairs = zip(self._costs(bits).tolist(), self._costs(self._table.round(bits)).tolist(), strict=True)
        return {
            limit.name: {
                "soft": soft,
                "rounded": rounded,
                "target": limit.target,
                "unit": limit.unit,
                "relative": rounded / limit.target - 1,
            }
            for limit, (soft, rounded) in zip(self._limits, pairs, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model: tensors, numbers and names."""
        return {
            "limits": [limit.name for limit in self._limits],
            "targets": [limit.target for limit in self._limits],
            "total_steps": self._controller.total_steps,
            "ramp": self._controller.ramp,
            "controller": {name: tensor.clone() for name, tensor in self._controller.state.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another search stopped, to the bit.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ConfigError: if it is of a search with other limits.
        """
        own = self.state_dict()
        for key in ("limits", "targets"):
            if state[key] != own[key]:
                raise ConfigError(
                    f"Search: expected a state with {key} {own[key]}, found {state[key]}. "
                    "Build it with the same budget."
                )
        device = self._table.device
        self._controller.total_steps, self._controller.ramp = state["total_steps"], state["ramp"]
        self._controller.state = {name: tensor.clone().to(device) for name, tensor in state["controller"].items()}
        self._calls = int(self._controller.state["step"])

    def __repr__(self) -> str:
        """Each limit with the range within reach, one a line."""
        return "\n".join([f"Search(penalty={self.kind!r})", *(f"  {found}" for found in self.feasible)])

    # ------------------------------------------------------------------ the numbers

    def _bits(self) -> Tensor:
        """Bits now, and everything on their device, wherever the model went since."""
        device = self._table.quantizers[0].alpha_raw.device
        if device != self._table.device:
            self._table.to(device)
            self._place_on(device)
            self._controller.to(device)
        return self._table.bits()

    def _place_on(self, device: torch.device) -> None:
        self._forms = [limit.form.to(device) for limit in self._limits]
        self._targets = self._targets.to(device)

    def _costs(self, bits: Tensor) -> Tensor:
        return torch.stack([cost(form, *self._table.split(bits)) for form in self._forms])

    def _relative_costs(self, bits: Tensor) -> Tensor:
        return self._costs(bits) / self._targets

    def _published(self, limit: Limit, bits: Tensor) -> Tensor:
        """The published penalty of one limit; the unit decides about its constants."""
        form = self._forms[self._limits.index(limit)]
        excess = cost(form, *self._table.split(bits)) - limit.target
        if limit.mode == "bound":
            excess = excess.clamp(min=0)
        unit, weight = {"bit": (1 / limit.denominator, 2.0**-23), "byte": (1 / 8, 2.0**-23), "BOP": (1e9, 3.0)}[
            limit.unit
        ]
        scaled = excess / unit
        return weight * smooth_l1_loss(scaled, torch.zeros_like(scaled), beta=1.0)
