"""One weight, one target: straight-through gradients hover at the rounding boundary, noise settles on the target.

    python experiments/scalar_toy/run.py      # writes results.jsonl, and the picture into docs/results/pictures

Gradient descent on (Q(x) - t)^2 with a step of 1, for 99 targets t between two levels: T1 and T2 of the paper map
(docs/internals/paper-map.md). All targets and seeds are the weights of one prepared layer, so what runs here is what
runs in a network.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nipq
from nipq.nn.layers import weight_quantizer
from nipq.prepare.layer_table import set_noise_mix_, set_phase_
from nipq.qat.oscillation import Oscillations
from nipq.train.run_folder import write_text

RESULTS = Path(__file__).parent / "results.jsonl"
FIGURE = Path(__file__).parents[2] / "docs" / "results" / "pictures" / "scalar_toy_oscillation.png"

SEEDS, STEPS, LAST, RATE = 20, 4000, 1000, 0.02
TARGETS = torch.arange(1, 100, dtype=torch.float64) / 100
SCHEDULES = ("cosine", "constant")
SHOWN = 0.3  # the target whose trajectories are drawn


@dataclass(frozen=True)
class Method:
    """A way to train a weight: through rounding, unless ``noise`` is given."""

    label: str
    noise: str | None = None
    tempered: bool = False
    dampen: float | None = None
    freeze: float | None = None


METHODS = (
    Method("straight-through"),
    Method("straight-through, dampened", dampen=1.0),
    Method("straight-through, frozen", freeze=0.01),
    Method("uniform noise", noise="uniform"),
    Method("empirical noise", noise="empirical"),
    Method("stochastic-rounding noise", noise="stochastic"),
    Method("uniform noise, error mixed in", noise="uniform", tempered=True),
)


class Runs(NamedTuple):
    """Course of training; tensors of shape (schedule, seed, target) unless said otherwise."""

    x: Tensor
    missed: Tensor  # |Q(x) - t| at the end
    late: Tensor  # its mean over the last steps
    flips: Tensor  # changes of level in the last steps
    farther: Tensor  # whether the level at the end is the farther one
    path: Tensor  # x of the shown target and the first seed, shape (step, schedule)


def prepared(method: Method, start: Tensor) -> nn.Linear:
    """A layer whose weights are the scalars, on a grid of step 1: signed 8 bits, alpha 127."""
    layer = nn.Linear(start.shape[1], start.shape[0], bias=False)
    config = nipq.Config(weight_bits=8, quantize_inputs=False, noise=method.noise or "uniform")
    nipq.prepare_(layer, torch.zeros(1, start.shape[1]), config)
    layer.double()
    layer.parametrizations.weight.original.data.copy_(start)
    weight_quantizer(layer).set_alpha_(torch.tensor(127.0))
    set_phase_(layer, "noise" if method.noise else "round")
    return layer.train()


def train(method: Method) -> Runs:
    """All schedules, seeds and targets at once; every seed starts its targets anywhere between the two levels."""
    torch.manual_seed(0)
    shape = (len(SCHEDULES), SEEDS, len(TARGETS))
    start = torch.rand(shape[1:], dtype=torch.float64).repeat(len(SCHEDULES), 1)  # the same for both schedules
    layer = prepared(method, start)
    quantizer, latent = weight_quantizer(layer), layer.parametrizations.weight.original
    calm = Oscillations(layer, STEPS, dampen=method.dampen, freeze=method.freeze)
    level = quantizer.codes(latent)
    flips, late, path = torch.zeros_like(level), torch.zeros_like(level), []
    for i in range(STEPS):
        if method.tempered:
            set_noise_mix_(layer, i / STEPS)
        loss = ((layer.weight - TARGETS) ** 2).sum() + calm.penalty()
        (gradient,) = torch.autograd.grad(loss, latent)
        share = torch.tensor([0.5 + 0.5 * math.cos(math.pi * i / STEPS), 1.0], dtype=torch.float64)
        latent.data.sub_(RATE * share.repeat_interleave(SEEDS)[:, None] * gradient)
        calm.step()
        before, level = level, quantizer.codes(latent)
        path.append(latent.detach().view(shape)[:, 0, TARGETS == SHOWN].flatten().clone())
        if i >= STEPS - LAST:
            flips += level != before
            late += (level - TARGETS).abs() / LAST
    missed, nearest = (level - TARGETS).abs(), torch.minimum(TARGETS, 1 - TARGETS)
    found = (latent.detach(), missed, late, flips, missed > nearest + 1e-9)
    return Runs(*(tensor.reshape(shape) for tensor in found), torch.stack(path))


def numbers(runs: Runs, schedule: int) -> dict[str, float]:
    """Means over targets, and for the distance their standard deviation over seeds."""
    missed = runs.missed[schedule].mean(1)
    hovering = (runs.x[schedule] - 0.5).abs() < RATE
    return {
        "distance": missed.mean().item(),
        "distance_deviation": missed.std().item(),
        f"distance_last_{LAST}": runs.late[schedule].mean().item(),
        f"flips_last_{LAST}": runs.flips[schedule].mean().item(),
        "farther_share": runs.farther[schedule].double().mean().item(),
        "at_boundary_share": hovering.double().mean().item(),
        "x_minus_target_rms": (runs.x[schedule] - TARGETS).square().mean().sqrt().item(),
    }


def plot(runs: dict[str, Runs]) -> None:
    """Draw x over training for one target, and the distance of the level over all targets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit = "[grid steps]"
    lines = {  # colour, width, height in the stack
        "straight-through": ("#c55a11", 1.8, 2.2),
        "straight-through, frozen": ("#5aa469", 5.0, 2.1),
        "uniform noise": ("#1f4e79", 1.8, 2.3),
    }
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", facecolor="white")
        for label, (colour, width, order) in lines.items():
            style = {"color": colour, "zorder": order}
            left.plot(runs[label].path[:, 0], linewidth=width / 2, **style)
            right.plot(TARGETS, runs[label].late[0].mean(0), linewidth=width, label=label, **style)
        for y, name in ((0.5, "rounding\nboundary"), (SHOWN, f"target t = {SHOWN}"), (0.0, "nearest level")):
            left.axhline(y, color="black", linewidth=1.0, linestyle=":", zorder=3)
            left.text(1.02, y, name, va="center", transform=left.get_yaxis_transform())
        left.set(xlabel="optimizer step", ylabel=f"weight x {unit}", xlim=(-50, STEPS), ylim=(-0.04, 0.6))
        left.set_title("Trajectory of one weight", pad=12)
        right.text(0.5, 0.3, "nearest level:\nmin(t, 1 - t)", ha="center")
        right.set(xlabel=f"target t {unit}", ylabel=f"|Q(x) - t|, last {LAST} steps {unit}", ylim=(0, 0.54))
        right.set_title(f"Distance of its level, mean of {SEEDS} seeds", pad=12)
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
        for axes in (left, right):
            axes.grid(color="#dddddd")
            axes.set_axisbelow(True)
        figure.savefig(FIGURE, dpi=120)


def measure() -> dict[str, Any]:
    """Train with all methods; draw the figure."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    runs = {}
    for method in METHODS:
        runs[method.label] = train(method)
        print(f"{method.label}: {time.perf_counter() - started:.0f} s", flush=True)
    plot(runs)
    return {
        "command": "python experiments/scalar_toy/run.py",
        "seeds": SEEDS,
        "targets": len(TARGETS),
        "steps": STEPS,
        "last": LAST,
        "rate": RATE,
        "nearest_level_distance": torch.minimum(TARGETS, 1 - TARGETS).mean().item(),
        "methods": {
            label: {schedule: numbers(found, index) for index, schedule in enumerate(SCHEDULES)}
            for label, found in runs.items()
        },
        "seconds": time.perf_counter() - started,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "nipq": nipq.__version__,
            **{name: version(name) for name in ("torch", "matplotlib")},
        },
    }


def main() -> None:
    """Train, write and draw."""
    write_text(RESULTS, json.dumps(measure()) + "\n")


if __name__ == "__main__":
    main()
