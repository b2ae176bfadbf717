"""What a training step of each method costs, on the network of the rivals' grid.

python -m benchmarks.methods --overwrite        # results/methods.json, in about two minutes

Every word of ``nipq.train.methods`` trains the same network from the same weights on the same batch, in turn, on one
thread; a ratio is that of one round's times, and what is kept is its median and quartiles. The teacher of the grid,
which costs all methods the same, is left out. Methods of one width have 3 bits, the others a search for 3 on average.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import nipq
from benchmarks import record
from benchmarks.timing import interleaved, quartiles, ratio
from nipq.compare import load_grid
from nipq.train.config import ModelConfig
from nipq.train.factory import build_model
from nipq.train.methods import METHODS

GRID = Path(__file__).parents[1] / "experiments/rivals/fashion_mobilenet_v2.yaml"
FLOAT, BITS, BATCH = "float", 3, 128
#: Small, so that hundreds of steps on one batch leave all numbers where they were.
RATE, STEPS = 1e-4, 10_000


def step_of(word: str) -> Callable[[], None]:
    """One training step of a method: forward, backward, optimizer, and what the method does after it.

    Args:
        word: of ``METHODS``, or ``float``.
    """
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(load_grid(GRID).base["model"]))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(BATCH, 1, 28, 28).to(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,))
    after: list[Callable[[], Any]] = []
    penalties: list[Callable[[], torch.Tensor]] = []
    if word == FLOAT:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    else:
        settings = METHODS[word]
        fields = dict(settings.get("quantization", {}))
        learned = settings.get("allocation", "learned") == "learned"
        if not learned:
            fields |= {"weight_bits": BITS, "activation_bits": BITS}
        nipq.prepare_(model, x[:1], nipq.Config.model_validate(fields))
        nipq.calibrate_(model, [x], batches=1)
        optimizer = torch.optim.SGD(nipq.param_groups(model, lr=RATE), momentum=0.9)
        if learned:
            inputs = fields.get("quantize_inputs", True)
            budget = nipq.AverageBits(weights=BITS, activations=BITS if inputs else None)
            search = nipq.Search(model, budget, STEPS, penalty=settings.get("penalty", "controller"))
            penalties.append(search.penalty)
            after.append(search.step)
        if "oscillation" in settings:
            oscillations = nipq.Oscillations(model, STEPS, **settings["oscillation"])
            penalties.append(oscillations.penalty)
            after.append(oscillations.step)
    model.train()

    def step() -> None:
        loss = cross_entropy(model(x), y)
        for penalty in penalties:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for call in after:
            call()

    return step


def main() -> None:
    """Measure and write."""
    given = record.parser(__doc__, "methods", 9).parse_args()
    record.refuse_existing(given.out, overwrite=given.overwrite)
    load = record.load()
    samples = interleaved({word: step_of(word) for word in (FLOAT, *METHODS)}, given.rounds)
    rows = {
        word: {
            "milliseconds": quartiles(seconds).times(1e3).rounded(),
            "ratio": ratio(seconds, samples[FLOAT]).rounded(),
        }
        for word, seconds in samples.items()
    }
    record.write(given.out, {**record.origin(load), "rounds": given.rounds, "batch": BATCH, "rows": rows})
    for word, row in rows.items():
        print(f"{word:16}", row["ratio"])


if __name__ == "__main__":
    main()
