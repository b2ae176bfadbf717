"""EfficientNet-Lite0 quantized after training with 256 unlabelled tiles: each stage, on tiles of other photographs.

    python -m experiments.post_training.run FOLDER [--cells 8/8 4/8 ...] [--seeds 0 1 2]

FOLDER holds the photographs and the published weights, see docs/results/tasks.md. Needs timm. Tiles are 160x160, cut
side by side from photographs whose shorter side is three tiles long; every third photograph is for the test. Each line
of results.jsonl is one state of one cell: agreement with the float network's first choice in per cent, and the
divergence KL(float || quantized) in nats, over all test tiles. The seed chooses the calibration tiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nipq
from experiments.tasks.cache import Arrays
from experiments.tasks.efficientnet_lite0 import DEVIATION, WEIGHTS, WEIGHTS_HELP, divergence, network, renamed
from experiments.tasks.photos import cached, pixels, textured, tiles
from nipq.budget.allocate import allocate_bits_
from nipq.budget.budget import AverageBits, Budget
from nipq.config import Config, Phase
from nipq.prepare.layer_table import set_phase_
from nipq.qat.batchnorm import reestimate_bn_
from nipq.train.factory import read_state

RESULTS = Path(__file__).with_name("results.jsonl")
SIZE, SAMPLES, BATCH, EVERY = 160, 256, 32, 3
#: Name of a cell: fixed bits of weights and activations, or average ones to allocate.
CELLS: dict[str, tuple[Config, Budget | None]] = {
    "8/8": (Config(granularity="channel", weight_bits=8, activation_bits=8), None),
    "8/8 per tensor": (Config(weight_bits=8, activation_bits=8), None),
    "4/8": (Config(granularity="channel", weight_bits=4, activation_bits=8), None),
    "4/8 per tensor": (Config(weight_bits=4, activation_bits=8), None),
    "4/4": (Config(granularity="channel", weight_bits=4, activation_bits=4), None),
    "4.0 mixed/8": (Config(granularity="channel", activation_bits=8), AverageBits(weights=4)),
    "4.0/4.0 mixed": (Config(granularity="channel"), AverageBits(weights=4, activations=4)),
}


def cut(photos: list[Path]) -> Arrays:
    """Tiles of all photographs, and the number of each one's photograph."""
    squares = [tiles(pixels(path, 3 * SIZE), SIZE) for path in photos]
    squares = [these[textured(these, DEVIATION)] for these in squares]
    return {
        "images": np.concatenate(squares).transpose(0, 3, 1, 2),
        "photo": np.repeat(np.arange(len(squares)), [len(these) for these in squares]),
    }


def data(folder: str, seed: int) -> tuple[list[Tensor], Tensor]:
    """Calibration batches chosen by the seed, and all test tiles, in [-1, 1]."""
    arrays = cached(folder, "post-training", (SIZE, DEVIATION), cut)
    images, photo = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["photo"])
    test = photo % EVERY == EVERY - 1
    rest = (~test).nonzero()[:, 0]
    chosen = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:SAMPLES]]
    return list((images[chosen] / 127.5 - 1).split(BATCH)), images[test] / 127.5 - 1


def pretrained(folder: str) -> nn.Module:
    """The network with its published weights, in evaluation mode."""
    found = sorted(Path(folder).rglob(WEIGHTS))
    if not found:
        raise SystemExit(f"expected {WEIGHTS} below {folder}, found none. {WEIGHTS_HELP}")
    model = network()
    model.load_state_dict(renamed(read_state(found[0]), model))
    return model.net.eval()


class Score:
    """Agreement and divergence of a network on the test tiles.

    Args:
        original: the float network.
        test: the tiles.
    """

    def __init__(self, original: nn.Module, test: Tensor) -> None:
        """Keep the float network's answers."""
        self.test = test.split(64)
        self.truth = self._answers(original)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Per cent of equal first choices with its standard error, and nats."""
        outputs = self._answers(model)
        share = float((outputs.argmax(1) == self.truth.argmax(1)).double().mean())
        return {
            "agreement": 100 * share,
            "standard_error": 100 * math.sqrt(share * (1 - share) / len(outputs)),
            "divergence": float(divergence(outputs, self.truth).double().mean()),
        }

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> Tensor:
        return torch.cat([model(batch) for batch in self.test])


def prepared(original: nn.Module, loader: list[Tensor], config: Config) -> nn.Module:
    """A prepared copy with calibrated ranges that rounds."""
    model = copy.deepcopy(original)
    nipq.prepare_(model, loader[0][:1], config)
    set_phase_(model, Phase.ROUND)
    return nipq.calibrate_(model, loader, len(loader)).eval()


def stages(original: nn.Module, loader: list[Tensor], cell: str) -> Iterator[tuple[str, nn.Module]]:
    """The stages of ``nipq.quantize`` one by one with all samples, each with and without batch norms moved."""
    config, budget = CELLS[cell]
    model = prepared(original, loader, config)
    for name in ["raw"] if budget is None else ["round 1", "round 2"]:
        if budget is not None:
            allocate_bits_(model, loader, budget, whole=True)
            nipq.calibrate_(model, loader, len(loader))
        yield name, model
        update = reestimate_bn_(model, loader, statistics="relative")
        yield f"{name}, batch norms relative", model
        update.undo()
    if cell == "8/8":
        reestimate_bn_(model, loader, statistics="absolute")
        yield "raw, batch norms absolute", model


def by_divergence(original: nn.Module, loader: list[Tensor], cell: str) -> Iterator[tuple[str, nn.Module]]:
    """Bits by the divergence KL(float || noisy) instead of the squared distance, measured once."""
    config, budget = CELLS[cell]
    if budget is None:
        return
    model = prepared(original, loader, config)
    with torch.no_grad():
        answered = [(batch, original(batch)) for batch in loader]
    allocate_bits_(model, answered, budget, lambda y, truth: divergence(y, truth).mean(), whole=True)
    nipq.calibrate_(model, loader, len(loader))
    yield "round 1 by divergence", model
    reestimate_bn_(model, loader, statistics="relative")
    yield "round 1 by divergence, batch norms relative", model


#: Parts of a cell: the stages one by one, another distance, and the whole.
PARTS = {"stages": stages, "divergence": by_divergence, "quantize": None}


def main() -> None:
    """Run the cells and append their lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original = pretrained(arguments.folder)
    where = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {"python": platform.python_version(), "nipq": nipq.__version__, "torch": torch.__version__},
    }
    score: Score | None = None
    for seed in arguments.seeds:
        loader, test = data(arguments.folder, seed)
        score = score or Score(original, test)
        for cell in arguments.cells:
            about = {"cell": cell, "seed": seed, "tiles": len(test), "samples": SAMPLES} | where
            for part in arguments.parts:
                states = PARTS[part]
                if states is None:
                    quantized(original, loader, score, about)
                else:
                    for state, model in states(original, loader, cell):
                        write(about, state, score(model))


def quantized(original: nn.Module, loader: list[Tensor], score: Score, about: dict[str, Any]) -> None:
    """The whole of ``nipq.quantize``."""
    started = time.perf_counter()
    config, budget = CELLS[about["cell"]]
    result = nipq.quantize(original, loader, budget, config=config, samples=SAMPLES)
    numbers = {"seconds": time.perf_counter() - started, "bytes": result.report.file_bytes}
    kept = [stage.name for stage in result.report.stages if stage.kept]
    write(about | {"kept": kept}, "nipq.quantize", score(result.model) | numbers)


def write(about: dict[str, Any], state: str, numbers: dict[str, float]) -> None:
    """Append a line to the results and show it."""
    line = {"network": "tf_efficientnet_lite0", "state": state} | numbers | about
    print(json.dumps(line), flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
