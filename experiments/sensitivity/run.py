"""T13: do learned bits agree with one-layer-at-a-time sensitivity?

    python experiments/sensitivity/run.py --data FOLDER --runs RUNS      # RUNS as for experiments/fashion_mnist/grid.py

For every float cell of the Fashion-MNIST grid: round the float network to 8 bits everywhere, then one tensor after the
other to 3 bits, and measure on 1,000 held-out validation images (a) how far the answers move, as the mean
Kullback-Leibler divergence from the 8-bit network's, and (b) how much the loss on the labels rises. (b) has a part of
either sign that is first order in the rounding error and drowns small effects, so (a) is drawn; both are written down.
Divided by the tensor's number of elements this is what a bit buys there per element that the budget counts. It is
compared, by Spearman's rank correlation, with the soft bits that the search learned in the cells of the same network
and seed, weights and inputs apart.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import nipq
from nipq.functional.clipping import noise_optimal_boundary
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import layer_table
from nipq.train.config import check_config
from nipq.train.data import load_data
from nipq.train.factory import build_model

HERE = Path(__file__).parent
GRID = HERE.parent / "fashion_mnist" / "results"
RESULTS = HERE / "results"
HIGH_BITS, LOW_BITS, IMAGES = 8, 3, 1000


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images."""
    return torch.cat([model(part) for part in images.split(500)])


def divergence(base: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the other answers from the base, in nats."""
    return float(kl_div(other.log_softmax(1), base.log_softmax(1), reduction="batchmean", log_target=True))


def low_boundary_(quantizer: TensorQuantizer, values: Tensor) -> None:
    """The best boundary at the low bit-width, so that the drop is the bits' and not the boundary's."""
    quantizer.freeze_bits_(LOW_BITS)
    axis = quantizer.channel_axis if quantizer.alpha_raw.numel() > 1 else None
    quantizer.set_alpha_(noise_optimal_boundary(values, float(LOW_BITS), quantizer.grid, channel_axis=axis))


def sensitivities(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Rise of the loss for each layer's weight and input."""
    nipq.prepare_(model, images[:1], nipq.Config(weight_bits=HIGH_BITS, activation_bits=HIGH_BITS))
    nipq.calibrate_(model, images.split(250), batches=8)
    nipq.set_phase_(model.eval(), "round")
    inputs: dict[str, Tensor] = {}
    rows = layer_table(model)
    handles = [
        row.input.register_forward_pre_hook(lambda _m, args, name=row.name: inputs.__setitem__(name, args[0]))
        for row in rows
        if row.input is not None
    ]
    answers(model, images[:500])
    for handle in handles:
        handle.remove()
    base = answers(model, images)
    base_loss = float(cross_entropy(base, labels))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        entry = {}
        weight: Tensor = row.layer.parametrizations.weight.original.detach()
        tensors = {"weight": (row.weight, weight, row.spec.weight_count)}
        if row.input is not None and not row.spec.is_input:
            tensors["activation"] = (row.input, inputs[row.name], row.spec.activation_count)
        for kind, (quantizer, values, count) in tensors.items():
            alpha = quantizer.alpha.detach().clone()
            low_boundary_(quantizer, values)
            changed = answers(model, images)
            quantizer.freeze_bits_(HIGH_BITS)
            quantizer.set_alpha_(alpha)
            entry[kind] = {
                "divergence": divergence(base, changed),
                "rise": float(cross_entropy(changed, labels)) - base_loss,
                "count": count,
            }
        found[row.name] = entry
    return found


def correlations(measured: dict[str, Any], learned: dict[str, list[float]]) -> dict[str, Any]:
    """Spearman's rank correlation of learned bits with sensitivity per element, weights and inputs apart."""
    result = {}
    for index, kind in enumerate(("weight", "activation")):
        names = [name for name, entry in measured.items() if kind in entry]
        bits = [learned[name][index] for name in names]
        result[kind] = {"tensors": len(names)}
        for measure_name in ("divergence", "rise"):
            sensitivity = [measured[name][kind][measure_name] / measured[name][kind]["count"] for name in names]
            test = spearmanr(bits, sensitivity)
            result[kind][measure_name] = {"rho": float(test.statistic), "p": float(test.pvalue)}
    return result


def measure(cell: dict[str, Any], data: Path, runs: Path) -> dict[str, Any]:
    """Sensitivities of one float cell; measured once, then read from its file."""
    network, seed = cell["cell"]["network"], cell["cell"]["seed"]
    place = RESULTS / f"{network}-seed{seed}.json"
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return found
    config = check_config(cell["config"] | {"data": cell["config"]["data"] | {"path": str(data)}})
    weights = runs / f"{network}-float-seed{seed}" / "float.pt"
    model = build_model(config.model.model_copy(update={"weights": str(weights)})).eval()
    split = load_data(config.data, config.seed).validation
    assert split is not None
    batches = list(split)
    images = torch.cat([x for x, _ in batches])[:IMAGES]
    labels = torch.cat([y for _, y in batches])[:IMAGES]
    found = {"network": network, "seed": seed, "sensitivity": sensitivities(model, images, labels)}
    place.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def compare(record: dict[str, Any]) -> dict[str, Any]:
    """The correlations with the bits that each budget's cell of the same network and seed learned."""
    by_budget = {}
    for path in sorted(GRID.glob(f"{record['network']}-*bit-seed{record['seed']}.json")):
        other = json.loads(path.read_text(encoding="utf-8"))
        by_budget[f"{other['cell']['bits']:g}"] = correlations(record["sensitivity"], other["learned_bits"])
    return record | {"spearman": by_budget}


def plot(records: list[dict[str, Any]], bits: str, path: Path) -> None:
    """Learned bits against sensitivity per element, one panel for each network and kind, seed 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [record for record in records if record["seed"] == 0]
    figure, axes = plt.subplots(len(shown), 2, figsize=(10, 3.8 * len(shown)), squeeze=False, layout="constrained")
    for line, record in zip(axes, shown, strict=True):
        other = json.loads((GRID / f"{record['network']}-{bits}bit-seed0.json").read_text(encoding="utf-8"))
        for index, (axis, kind) in enumerate(zip(line, ("weight", "activation"), strict=True)):
            names = [name for name, entry in record["sensitivity"].items() if kind in entry]
            measured = [record["sensitivity"][name][kind] for name in names]
            xs = [entry["divergence"] / entry["count"] for entry in measured]
            ys = [other["learned_bits"][name][index] for name in names]
            rho = record["spearman"][bits][kind]["divergence"]["rho"]
            axis.scatter(xs, ys, c="#2166ac", s=26)
            axis.set_xscale("log")
            axis.set(
                title=f"{record['network']}, {kind}s: Spearman {rho:+.2f}",
                xlabel=f"divergence of the answers at {LOW_BITS} bits, per element [nat]",
                ylabel=f"learned bits (budget {bits}/{bits})",
            )
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every float cell that is not measured yet; write the correlations and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the four idx files")
    parser.add_argument("--runs", type=Path, required=True, help="run folders of the grid")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(GRID.glob("*-float-seed*.json"))]
    records = [compare(measure(cell, arguments.data, arguments.runs)) for cell in cells]
    result = {
        "command": "python experiments/sensitivity/run.py --data FOLDER --runs RUNS",
        "machine": cells[0]["machine"],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("nipq", "torch", "scipy")},
        },
        "low_bits": LOW_BITS,
        "high_bits": HIGH_BITS,
        "images": IMAGES,
        "cells": [{key: record[key] for key in ("network", "seed", "spearman")} for record in records],
    }
    (RESULTS / "sensitivity.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(records, "3", RESULTS / "sensitivity.png")
    for record in records:
        print(record["network"], record["seed"], json.dumps(record["spearman"]))


if __name__ == "__main__":
    main()
