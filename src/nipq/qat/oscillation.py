"""Oscillating weights in quantization-aware training: measured, dampened, or frozen.

Under straight-through gradients a weight whose best value lies between two levels is pushed over the rounding threshold
from both sides and never comes to rest (T1 in the paper map). The remedies are those of "Overcoming
Oscillations in Quantization-Aware Training" (arXiv 2203.11086); the constants are those of its published code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nipq.distributed import is_sharded
from nipq.errors import ConfigError
from nipq.functional.grid import Grid
from nipq.nn.layers import float_weight
from nipq.nn.quantizer import WeightQuantizer
from nipq.prepare.layer_table import weight_table

#: Momentum of the frequency and of the mean code: both look back over about 100 steps.
MOMENTUM = 0.01
#: Share of training before dampening or freezing begins.
ANNEAL_FROM = 0.25
#: Frequency above which weights are frozen at first; falls to the final value.
FREEZE_START = 0.1
#: Frequency above which a weight counts as oscillating in reports.
OSCILLATING = 0.005


class Oscillations:
    """Tracks weights that oscillate between two levels during training, and dampens or freezes them.

    ::

        loss = criterion(model(x), y) + oscillations.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        oscillations.step()

    A weight oscillates in a step that changes its integer code in the direction opposite to its last change. With o = 1
    in such a step and 0 in others its frequency is f <- m o + (1 - m) f, and its mean code follows the code alike.

    ``dampen`` adds lambda * sum over all weights of (Q(w) - clip(w))^2 to the loss, where clip is to the quantizer's
    range and only the float weight gets a gradient: a pull to the middle of the bin. lambda rises from 0 to ``dampen``.
    The published recipe says 0.1, but divides the sum of each output channel by its number of weights.

    ``freeze`` fixes a weight whose frequency exceeds a threshold at its mean code, rounded, for the rest of training.
    The code is fixed, not the value: the step goes on learning, though from the other weights, as a frozen one lies in
    the middle of its bin and has no rounding error. The threshold falls from 0.1 to ``freeze``; the
    published recipes end at 0.011 (3 bits) and 0.01 (4 bits). It is done by writing the float weight back to its bin
    after every optimizer step, hence no momentum or decay can move it, and nothing is added to the model.

    Both change by half a cosine over the last three quarters of training and do nothing before. Where a bit-width
    changes, codes are counted on another grid, so that tensor's history starts anew.

    Args:
        model: a prepared model.
        total_steps: how often ``step`` will be called.
        dampen: final weight of the penalty, >= 0, in units of the loss for one squared unit of weight; None for none.
        freeze: final threshold, oscillations a step, above 0 and at most 0.1; None to freeze nothing.
        momentum: m, above 0 and at most 1. A threshold should be well above it: one oscillation lifts f by m.

    Raises:
        OrderError: if the model is not prepared.
        ConfigError: if a setting is out of range, or weights are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        dampen: float | None = None,
        freeze: float | None = None,
        momentum: float = MOMENTUM,
    ) -> None:
        check_oscillation(total_steps, dampen, freeze, momentum)
        self.total_steps = total_steps
        self.dampen = dampen
        self.freeze = freeze
        self.momentum = momentum
        self._calls = 0
        for row, quantizer in weight_table(model):
            if is_sharded(float_weight(row.layer)):
                raise ConfigError(
                    f"{quantizer.name}: expected a whole weight to watch for oscillations, found a sharded one. "
                    "Use DistributedDataParallel, or leave Oscillations out."
                )
        self._layers = {weight: row.layer for row, weight in weight_table(model)}  # tied weights once
        # Never written to in place, so that state_dict need not copy.
        self._history = {quantizer.name: _new_history(quantizer, weight) for quantizer, weight in self._tensors()}

    def penalty(self) -> Tensor:
        """The dampening term to add to the loss: a float32 number, 0 without ``dampen``.

        Returns:
            lambda * sum (Q(w) - clip(w))^2, no dimensions; differentiable in the float weights alone.
        """
        strength = (self.dampen or 0.0) * self._progress()
        total = torch.zeros((), device=next(self._tensors())[1].device)
        if strength == 0:
            return total
        for quantizer, weight in self._tensors():
            step, low, high = _grid(quantizer, weight.ndim)
            clipped = weight.clamp(low * step, high * step)
            total = total + (clipped - quantizer.codes(weight) * step).square().sum().float()
        return strength * total

    @torch.no_grad()
    def step(self) -> None:
        """Take one step of training into account and put frozen weights back; call it after the optimizer's step."""
        self._calls += 1
        threshold = self._threshold()
        for quantizer, weight in self._tensors():
            past = {name: tensor.to(weight.device) for name, tensor in self._history[quantizer.name].items()}
            if not torch.equal(past["span"], _span(quantizer)):
                past = _new_history(quantizer, weight)
            history = self._advance(past, quantizer.codes(weight), threshold, quantizer.grid)
            self._history[quantizer.name] = history
            if threshold < math.inf:
                weight.copy_(_with_frozen(quantizer, weight, history))

    def frequency(self) -> dict[str, float]:
        """Share of each tensor's weights that oscillate, that is with f above 0.005 (reads values).

        Returns:
            Name of the tensor -> share, 0 to 1.
        """
        return {
            name: (history["frequency"] > OSCILLATING).float().mean().item() for name, history in self._history.items()
        }

    def frozen(self) -> dict[str, float]:
        """Share of each tensor's weights that are frozen (reads values).

        Returns:
            Name of the tensor -> share, 0 to 1.
        """
        return {name: history["frozen"].float().mean().item() for name, history in self._history.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model: tensors, numbers and names."""
        return {
            "total_steps": self.total_steps,
            "dampen": self.dampen,
            "freeze": self.freeze,
            "momentum": self.momentum,
            "calls": self._calls,
            "history": {name: dict(history) for name, history in self._history.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one stopped, to the bit.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ConfigError: if it is of a model with other weights.
        """
        expected, found = _shapes(self._history), _shapes(state["history"])
        if expected != found:
            name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
            raise ConfigError(
                f"Oscillations: expected a state with {name} of shape {expected.get(name)}, found "
                f"{found.get(name)}. Build it for the same model."
            )
        self.total_steps, self._calls = state["total_steps"], state["calls"]
        self.dampen, self.freeze, self.momentum = state["dampen"], state["freeze"], state["momentum"]
        self._history = {name: dict(history) for name, history in state["history"].items()}

    # ------------------------------------------------------------------ the numbers

    def _tensors(self) -> Iterator[tuple[WeightQuantizer, Tensor]]:
        """Each quantizer and the float weight behind it, looked up anew: a model may replace its parameters."""
        for quantizer, layer in self._layers.items():
            yield quantizer, float_weight(layer)

    def _progress(self) -> float:
        """0 before the annealing, then up to 1 by half a cosine."""
        passed = (self._calls / self.total_steps - ANNEAL_FROM) / (1 - ANNEAL_FROM)
        return 0.5 * (1 - math.cos(math.pi * min(max(passed, 0.0), 1.0)))

    def _threshold(self) -> float:
        """Frequency above which weights are frozen now; infinite while none is."""
        if self.freeze is None or self._calls < ANNEAL_FROM * self.total_steps:
            return math.inf
        return FREEZE_START + (self.freeze - FREEZE_START) * self._progress()

    def _advance(self, past: dict[str, Tensor], codes: Tensor, threshold: float, grid: Grid) -> dict[str, Tensor]:
        """The history after one more step, in which the optimizer left the weights at ``codes``."""
        if threshold < math.inf:
            codes = torch.where(past["frozen"], past["codes"], codes)
        change = (codes - past["codes"]).sign()
        back = change * past["direction"] < 0
        frequency = past["frequency"].lerp(back.to(past["frequency"]), self.momentum)
        mean = past["mean"].lerp(codes, self.momentum)
        frozen = past["frozen"]
        if threshold < math.inf:
            newly = (frequency > threshold) & ~frozen
            nearest = 2 * (mean / 2).floor() + 1 if grid.codes_per_step == 2 else mean.round()  # codes may all be odd
            codes, frozen = torch.where(newly, nearest, codes), frozen | newly
        return {
            "span": past["span"],
            "codes": codes,
            "direction": torch.where(change == 0, past["direction"], change),
            "frequency": frequency,
            "mean": mean,
            "frozen": frozen,
        }


def check_oscillation(total_steps: int, dampen: float | None, freeze: float | None, momentum: float) -> None:
    """Refuse settings of :class:`Oscillations` that are out of range.

    Args:
        total_steps: see there.
        dampen: see there.
        freeze: see there.
        momentum: see there.

    Raises:
        ConfigError: naming the first one.
    """
    if total_steps < 1:
        raise ConfigError(f"Oscillations: expected at least one step, found total_steps={total_steps}.")
    if dampen is not None and not (dampen >= 0 and math.isfinite(dampen)):
        raise ConfigError(f"Oscillations: expected dampen >= 0, found {dampen}. The published recipe has 0.1.")
    if freeze is not None and not 0 < freeze <= FREEZE_START:
        raise ConfigError(
            f"Oscillations: expected freeze above 0 and at most {FREEZE_START}, found {freeze}. Try 0.01."
        )
    if not 0 < momentum <= 1:
        raise ConfigError(f"Oscillations: expected momentum above 0 and at most 1, found {momentum}. Try 0.01.")


def _span(quantizer: WeightQuantizer) -> Tensor:
    """Steps between the outermost levels: tells the grid of one bit-width from that of another."""
    low, high = quantizer.code_range()
    return ((high - low) / quantizer.grid.codes_per_step).max().detach()


def _new_history(quantizer: WeightQuantizer, weight: Tensor) -> dict[str, Tensor]:
    """History of a weight that has not moved; ``direction`` is that of the last change."""
    codes = quantizer.codes(weight.detach())
    return {
        "span": _span(quantizer),
        "codes": codes,
        "direction": torch.zeros_like(codes),
        "frequency": torch.zeros_like(codes),
        "mean": codes,
        "frozen": torch.zeros_like(codes, dtype=torch.bool),
    }


def _grid(quantizer: WeightQuantizer, ndim: int) -> list[Tensor]:
    """Step, lowest and highest code, without gradient, in shapes that broadcast to a weight of ``ndim`` axes."""
    shape = [-1 if axis == quantizer.channel_axis else 1 for axis in range(ndim)]
    return [value.detach().reshape(shape) for value in (quantizer.step(), *quantizer.code_range())]


def _with_frozen(quantizer: WeightQuantizer, weight: Tensor, history: dict[str, Tensor]) -> Tensor:
    """The weight, its frozen elements in the middle of their bins.

    Of an outer bin only the inner half is in range, so its middle is a quarter step inside: whether the element counts
    as truncated, and so its gradient, must not hang on the last bit of code * step.
    """
    step, low, high = _grid(quantizer, weight.ndim)
    quarter = quantizer.grid.codes_per_step / 4
    middle = history["codes"].clamp(low + quarter, high - quarter) * step
    return torch.where(history["frozen"], middle.to(weight), weight)


def _shapes(history: dict[str, dict[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(part["codes"].shape) for name, part in history.items()}
