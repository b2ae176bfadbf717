"""Cost of a training step of each method, on the network of the grid of baselines.

python -m benchmarks.methods --overwrite        # results/methods.jsonl, in about two minutes

Every word of ``nipq.train.config`` trains the same network from the same weights on the same batch, in turn, on one
thread; a ratio is that of one round's times, and what is kept is its median and quartiles. The teacher of the grid,
which costs all methods the same, is left out. Methods of one width have 3 bits, the others a search for 3 on average.
"""

from __future__ import annotations

from pathlib import Path

import torch

import nipq
from benchmarks import record
from benchmarks.networks import in_layout
from benchmarks.timing import interleaved, quartiles, ratio
from benchmarks.variants import FLOAT, RATE, STEPS, Training
from nipq.qat.oscillation import Oscillations
from nipq.qat.search import Search
from nipq.train.compare import load_grid
from nipq.train.config import METHODS, ModelConfig
from nipq.train.factory import build_model

GRID = Path(__file__).parents[1] / "experiments/baselines/fashion_mobilenet_v2.yaml"
BITS, BATCH = 3, 128


def training(word: str) -> Training:
    """The network under one method, with what the method adds to the loss and does after a step.

    Args:
        word: of ``METHODS``, or ``float``.
    """
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate(load_grid(GRID).base["model"]))
    model = model.to(memory_format=torch.channels_last).train()
    x, y = in_layout(torch.randn(BATCH, 1, 28, 28), "channels_last"), torch.randint(10, (BATCH,))
    if word == FLOAT:
        return Training(model, x, y, torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9))
    settings = METHODS[word]
    fields = dict(settings.get("quantization", {}))
    learned = settings.get("allocation", "noise") in ("noise", "middle")
    if not learned:
        fields |= {"weight_bits": BITS, "activation_bits": BITS}
    nipq.prepare_(model, x[:1], nipq.Config.model_validate(fields))
    nipq.calibrate_(model, [x], batches=1)
    found = Training(model.train(), x, y, torch.optim.SGD(nipq.param_groups(model, lr=RATE), momentum=0.9))
    if learned:
        budget = nipq.AverageBits(weights=BITS, activations=BITS if fields.get("quantize_inputs", True) else None)
        search = Search(model, budget, STEPS, penalty=settings.get("penalty", "controller"))
        found.penalty, found.after = search.penalty, search.step
    elif "oscillation" in settings:
        watch = Oscillations(model, STEPS, **settings["oscillation"])
        found.penalty, found.after = watch.penalty, watch.step
    return found


def main() -> None:
    """Measure and write."""
    given = record.parser(__doc__, "methods", 9).parse_args()
    record.refuse_existing(given.out, overwrite=given.overwrite)
    load = record.load()
    samples = interleaved({word: training(word).step for word in (FLOAT, *METHODS)}, given.rounds)
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
