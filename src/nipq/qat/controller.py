"""The price of exceeding a limit, found while training: a feedback loop with a fixed time scale and no fixed unit.

A budget is a constraint, so its penalty has to carry a Lagrange multiplier that nobody knows beforehand; it differs by
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
where the average swings by 2 to 7 % at a fixed price, too; the other two end 1.6 % off. The snap then keeps the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nipq.errors import ConfigError

#: How far ahead an error is extrapolated, and how fast its slope is smoothed; shares of training.
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
