"""Cost of each further quantizer in a training step, from 10 to 2,000 of them on layers with next to no work.

python -m benchmarks.many_quantizers --overwrite        # results/many_quantizers.jsonl, in about two minutes

A chain of linear layers of 8 x 8 has two quantizers each. A cost that is constant per quantizer grows in proportion to
their number; whatever looks at all of them for each of them would grow faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nipq
from benchmarks import record
from benchmarks.timing import Samples, interleaved, quartiles
from nipq.prepare.layer_table import set_noise_mix_
from nipq.qat.search import Search

COUNTS = (10, 50, 200, 1000, 2000)
WIDTH, BATCH = 8, 4

#: Parts of a step, by name.
Parts = dict[str, Callable[[], object]]


def chain(layers: int) -> nn.Sequential:
    """Linear layers, one after the other, that keep the size of what passes."""
    linear = [nn.Linear(WIDTH, WIDTH) for _ in range(layers)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*linear)


def float_parts(layers: int, x: Tensor) -> Parts:
    """The step of the float chain."""
    model = chain(layers)

    def step() -> None:
        model(x).square().mean().backward()

    return {"float forward + backward": step}


def prepared_chain(layers: int, x: Tensor) -> nn.Sequential:
    """The chain with quantizers, in training."""
    model = chain(layers)
    nipq.prepare_(model, x, nipq.Config())
    nipq.calibrate_(model, [x], batches=1)
    return model.train()


def own_parts(layers: int, x: Tensor) -> Parts:
    """The parts of the same step with quantizers, and what some runs call at every step besides."""
    model, tempered = prepared_chain(layers, x), prepared_chain(layers, x)
    optimizer = torch.optim.SGD(nipq.param_groups(model, lr=1e-6), momentum=0.9)
    search = Search(model, nipq.AverageBits(weights=4, activations=4), 1000, optimizer=optimizer)

    def step() -> None:
        model(x).square().mean().backward()

    def penalty() -> None:
        search.penalty().backward()  # type: ignore[no-untyped-call]  # torch gives it no type

    step()
    penalty()
    return {
        "forward + backward": step, "penalty + backward": penalty, "search.step": search.step,
        "search.distance": search.distance, "optimizer.step": optimizer.step,
        "set_noise_mix_": lambda: set_noise_mix_(tempered, 0.5),
    }  # fmt: skip


#: Parts that every step of a search has, beside the float one's.
OWN_STEP = ("forward + backward", "penalty + backward", "search.step")


def overhead(parts: Samples) -> list[float]:
    """Seconds that a step of the search takes more than one of float training, for each round.

    Args:
        parts: seconds by part, in rounds.
    """
    own = zip(*(parts[part] for part in OWN_STEP), strict=True)
    return [sum(step) - plain for step, plain in zip(own, parts["float forward + backward"], strict=True)]


def per_quantizer(samples: dict[int, Samples]) -> dict[str, dict[str, list[float]]]:
    """Microseconds for each quantizer, by part and number of quantizers.

    Args:
        samples: seconds, by number of quantizers and part.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for count, parts in samples.items():
        for part, seconds in parts.items():
            found.setdefault(part, {})[str(count)] = quartiles(seconds).times(1e6 / count).rounded()
    return found


def growth(costs: dict[str, list[float]]) -> float:
    """Ratio of the cost of a quantizer among many to that among 200; 1 when nothing is looked at twice.

    Args:
        costs: microseconds for each quantizer, by number of quantizers.
    """
    numbers = sorted(costs, key=int)
    base = "200" if "200" in costs else numbers[0]
    return round(costs[numbers[-1]][1] / costs[base][1], 2)


def main() -> None:
    """Measure and write."""
    given = record.parser(__doc__, "many_quantizers", 9, counts=COUNTS).parse_args()
    record.refuse_existing(given.out, overwrite=given.overwrite)
    load, samples = record.load(), {}
    for count in given.counts:
        torch.manual_seed(0)
        x = torch.randn(BATCH, WIDTH)
        tasks = own_parts(count // 2, x) | float_parts(count // 2, x)
        samples[count] = interleaved(tasks, given.rounds, least=0.01)
        samples[count]["all of a step minus float"] = overhead(samples[count])
        print(
            count, {part: f"{quartiles(s).median * 1e6 / count:.2f}" for part, s in samples[count].items()}, flush=True
        )
    costs = per_quantizer(samples)
    result: dict[str, Any] = {"microseconds": costs, "growth": {part: growth(found) for part, found in costs.items()}}
    print(result["growth"])
    record.write(given.out, {**record.origin(load), "rounds": given.rounds, **result})


if __name__ == "__main__":
    main()
