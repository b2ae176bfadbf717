"""The controller reaches the target on a toy network, whatever the optimizer, the sizes and the loss's scale.

The toy network is the theory's: layer q loses s_q 4^-b_q, and its gradient is known only up to 50 % noise. Its best
bits under an average are the reverse water-filling: s_q 4^-b_q / c_q equal for all layers within their range.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nipq.errors import ConfigError
from nipq.qat.search import PriceController

LOW, HIGH, START = 2.0, 8.0, 5.0


def layers(count: int = 24) -> tuple[Tensor, Tensor]:
    """Shares of the cost of layers with 1e2 to 1e6 elements, and sensitivities within a factor 100 of in proportion."""
    share = 10 ** torch.empty(count, dtype=torch.float64).uniform_(2, 6)
    share /= share.sum()
    return share, share * 4**4 * 10 ** torch.empty(count, dtype=torch.float64).uniform_(-1, 1)


def search(
    share: Tensor, sensitivity: Tensor, target: float, steps: int, optimizer: str, lr: float, mode: str, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Relative error of the average after each step, and the final bits."""
    raw = torch.zeros_like(share, requires_grad=True)
    kinds = {"sgd": lambda: torch.optim.SGD([raw], lr=lr, momentum=0.9), "adam": lambda: torch.optim.Adam([raw], lr=lr)}
    descent = kinds[optimizer]()

    def bits() -> Tensor:
        return LOW + (HIGH - LOW) * torch.sigmoid(raw)

    def relative_cost() -> Tensor:
        return (share @ bits() / target)[None]

    controller = PriceController(relative_cost().detach(), torch.tensor([mode == "target"]), steps, ramp=0.5)
    errors = []
    for step in range(steps):
        if cosine:
            descent.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        cost = relative_cost()
        noise = 1 + 0.5 * torch.randn_like(share)
        loss = (noise * sensitivity * 4 ** -bits()).sum() + (controller.prices(cost.detach()) * cost).sum()
        descent.zero_grad()
        loss.backward()
        descent.step()
        with torch.no_grad():
            controller.step(relative_cost())
            errors.append(relative_cost()[0] - 1)
    return torch.stack(errors), bits().detach()


@pytest.mark.parametrize(
    ("optimizer", "lr", "steps", "scale", "target", "cosine"),
    [
        ("sgd", 0.04, 300, 0.03, 4.0, False),
        ("sgd", 0.04, 300, 0.03, 3.0, True),
        ("sgd", 0.04, 1000, 0.001, 4.0, True),
        ("sgd", 0.04, 1000, 0.1, 3.0, False),
        ("adam", 1e-2, 300, 0.001, 4.0, False),
        ("adam", 1e-2, 300, 0.3, 4.0, True),
        ("adam", 1e-2, 1000, 0.03, 3.0, False),
        ("adam", 1e-3, 1000, 0.03, 4.0, False),
    ],
)
def test_the_average_ends_within_one_per_cent_and_does_not_swing(optimizer, lr, steps, scale, target, cosine) -> None:
    share, sensitivity = layers()
    errors, _ = search(share, scale * sensitivity, target, steps, optimizer, lr, "bound", cosine)
    assert errors[-1].abs() < 0.01
    assert errors[int(0.8 * steps) :].std() < 0.01


def test_a_target_is_approached_from_below_and_a_bound_is_not() -> None:
    share, sensitivity = layers()
    target, _ = search(share, 1e-4 * sensitivity, 6.0, 1000, "sgd", 0.04, "target", cosine=True)
    bound, _ = search(share, 1e-4 * sensitivity, 6.0, 1000, "sgd", 0.04, "bound", cosine=True)
    assert target[-1].abs() < 0.01
    assert bound[-1] < -0.1  # the loss alone hardly moves, and nothing else may push bits up


def test_the_bits_come_near_the_reverse_water_filling() -> None:
    share, sensitivity = layers()
    errors, bits = search(share, 0.1 * sensitivity, 4.0, 2000, "adam", 1e-2, "bound", cosine=True)
    assert errors[-1].abs() < 0.01
    best = water_filling(share, sensitivity, float(share @ bits))
    excess = (sensitivity * 4**-bits).sum() / (sensitivity * 4**-best).sum() - 1
    uniform = (sensitivity * 4 ** -(share @ bits)).sum() / (sensitivity * 4**-best).sum() - 1
    assert 0 <= excess < 0.02 < 0.1 < uniform


def water_filling(share: Tensor, sensitivity: Tensor, average: float) -> Tensor:
    """Best bits of the toy network under an average: bisection for the level of the water."""
    low, high = -60.0, 60.0
    for _ in range(200):
        level = (low + high) / 2
        bits = (0.5 * (torch.log2(sensitivity / share) - level)).clamp(LOW, HIGH)
        low, high = (level, high) if share @ bits > average else (low, level)
    return bits


def test_the_reference_falls_along_a_cosine_and_stays() -> None:
    controller = PriceController(torch.tensor([2.0]), torch.tensor([False]), total_steps=8, ramp=0.5)
    seen = []
    for _ in range(10):
        seen.append(controller.reference().item())
        controller.step(torch.tensor([1.0]))
    expected = [1.5 + 0.5 * math.cos(math.pi * min(1, t / 4)) for t in range(1, 11)]
    assert seen == pytest.approx(expected)


def test_prices_of_bounds_are_never_negative_and_of_targets_may_be() -> None:
    controller = PriceController(torch.ones(2), torch.tensor([False, True]), total_steps=100, ramp=0.5)
    for _ in range(300):  # past the end is allowed
        controller.step(torch.tensor([0.5, 0.5]))
    bound, target = controller.prices(torch.tensor([0.5, 0.5])).tolist()
    assert bound == 0
    assert -1e4 < target < -100  # the memory is bounded


def test_impossible_settings_are_refused() -> None:
    one, no = torch.ones(1), torch.tensor([False])
    with pytest.raises(ConfigError, match="expected total_steps of at least 1, found 0"):
        PriceController(one, no, 0, 0.5)
    with pytest.raises(ConfigError, match=r"expected ramp from 0 to 1.*found 1\.5"):
        PriceController(one, no, 10, 1.5)
