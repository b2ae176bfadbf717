"""Counts how often the freeze exceeds a budget: random models, random bits, random budgets, counted anew.

    python experiments/freeze_overshoot/run.py

Small random CNNs (with depthwise layers, fixed bit-widths and allowed sets), torchvision's ResNet-18 and MobileNet-v2;
learned bits drawn at random instead of trained, for the freeze must hold wherever training ends; one to four limits
at a random place of what is possible, the very lowest included. What a frozen model costs is counted here from its
layers and from the bytes of its packed file, not by the code under test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from fractions import Fraction
from functools import reduce
from importlib.metadata import version
from operator import and_
from pathlib import Path

import torch
import torchvision
from torch import nn

import nipq
from nipq.budget.bit_table import feasible_range
from nipq.budget.budget import Budget
from nipq.export.packed_write import file_bytes
from nipq.prepare.layer_table import layer_table, quantizers
from nipq.train.run_folder import write_text

RESULTS = Path(__file__).parent / "results.jsonl"
NETWORKS = {"random CNN": 176, "resnet18": 14, "mobilenet_v2": 10}
RANGES = [(2, 8), (2, 8), (3, 6), (2, 14), {2, 4, 8}, {4, 8}]
KINDS = ("average weight bits", "average activation bits", "model size", "bit-operations")


def random_cnn(draw: random.Random) -> nn.Module:
    """Two to five convolutions, some depthwise, then a linear layer; 12 by 12 images."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(draw.randint(2, 5)):
        if layers and draw.random() < 0.3:
            width, groups = channels, channels
        else:
            width, groups = draw.randint(4, 48), 1
        layers += [nn.Conv2d(channels, width, 3, padding=1, groups=groups), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


def prepared(network: str, draw: random.Random) -> nn.Module:
    """A prepared model with random learned bits."""
    if network == "random CNN":
        model, images = random_cnn(draw), torch.randn(2, 3, 12, 12)
        rules = (nipq.Rule("0", weight_bits=draw.choice([*RANGES, 8])),)
    else:
        model, images, rules = getattr(torchvision.models, network)(), torch.randn(2, 3, 32, 32), ()
    config = nipq.Config(weight_bits=draw.choice(RANGES), activation_bits=draw.choice(RANGES), rules=rules)
    nipq.prepare_(model, images, config)
    nipq.calibrate_(model, [images])
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            nn.init.normal_(quantizer.bit_raw, mean=draw.uniform(-1, 1), std=2.0)
    return model.eval()


def random_budget(model: nn.Module, draw: random.Random) -> tuple[Budget, dict[str, float]]:
    """One to four limits within what is possible."""
    rows = layer_table(model)
    every = nipq.AverageBits(8, 8) & nipq.ModelSize("1 GB") & nipq.BitOps("1 T")
    targets: dict[str, float] = {}
    for limit in draw.sample(every.limits(model), draw.randint(1, 4)):
        found = feasible_range(limit, rows)
        share = draw.choice([0.0, draw.random() ** 2, draw.random() ** 2, draw.random() ** 2])
        wanted = found.low + share * (found.high - found.low)
        targets[limit.name] = math.ceil(wanted * 1e4) / 1e4 if limit.unit == "bit" else int(wanted)
    parts: list[Budget] = []
    for name, target in targets.items():
        mode = draw.choice(["bound", "target"])
        if name == KINDS[0]:
            parts.append(nipq.AverageBits(weights=target, mode=mode))
        elif name == KINDS[1]:
            parts.append(nipq.AverageBits(activations=target, mode=mode))
        elif name == KINDS[2]:
            parts.append(nipq.ModelSize(int(target), mode=mode))
        else:
            parts.append(nipq.BitOps(int(target), mode=mode))
    return reduce(and_, parts), targets


def count(model: nn.Module, name: str) -> Fraction:
    """Cost of a frozen model, counted from its layers (all inputs are quantized, no weight is shared)."""
    rows = layer_table(model)
    assert len({row.weight for row in rows}) == len(rows)
    if name == KINDS[0]:
        total = sum(row.spec.weight_count for row in rows)
        return Fraction(sum(row.spec.weight_count * row.weight.bits_rounded for row in rows), total)
    if name == KINDS[1]:
        inner = [(row.spec.activation_count, row.input.bits_rounded) for row in rows if not row.spec.is_input]
        return Fraction(sum(n * bits for n, bits in inner), sum(n for n, _ in inner))
    if name == KINDS[2]:
        return Fraction(file_bytes(nipq.convert(model)))
    return Fraction(sum(row.spec.macs * row.weight.bits_rounded * row.input.bits_rounded for row in rows))


def main() -> None:
    """Run all pairs and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    started = time.perf_counter()
    limits = dict.fromkeys(KINDS, 0)
    overshoots, worst, snaps, slack = 0, Fraction(-1), [], []
    for network, pairs in NETWORKS.items():
        for _ in range(pairs):
            model = prepared(network, draw)
            budget, targets = random_budget(model, draw)
            before = time.perf_counter()
            nipq.freeze_bits_(model, budget)
            snaps.append(time.perf_counter() - before)
            excess = [count(model, name) / Fraction(str(target)) - 1 for name, target in targets.items()]
            for name in targets:
                limits[name] += 1
            overshoots += max(excess) > 0
            worst = max(worst, max(excess))
            slack.append(-float(max(excess)))
        print(f"{network}: {pairs} pairs, {overshoots} above so far, {time.perf_counter() - started:.0f} s", flush=True)
    record = {
        "command": f"python experiments/freeze_overshoot/run.py --seed {arguments.seed}",
        "seed": arguments.seed,
        "pairs": sum(NETWORKS.values()),
        "networks": NETWORKS,
        "limits": limits,
        "overshoots": overshoots,
        "largest_relative_excess": float(worst),
        "median_relative_slack_of_the_tightest_limit": sorted(slack)[len(slack) // 2],
        "seconds_of_a_snap": {"median": sorted(snaps)[len(snaps) // 2], "largest": max(snaps)},
        "seconds": time.perf_counter() - started,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "nipq": nipq.__version__,
            **{name: version(name) for name in ("torch", "torchvision", "scipy")},
        },
    }
    write_text(RESULTS, json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
