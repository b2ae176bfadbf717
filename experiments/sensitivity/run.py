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
from nipq.functional.clipping import noise_optimal_range
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.train.config import check_config
from nipq.train.data import load_data
from nipq.train.factory import build_model
from nipq.train.records import Record, Records

GRID = Records(Path(__file__).parents[1] / "fashion_mnist" / "results.jsonl")
RESULTS = Records(Path(__file__).parent / "results.jsonl", lambda record: f"{record['network']}-seed{record['seed']}")
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
    quantizer.set_alpha_(noise_optimal_range(values, float(LOW_BITS), quantizer.grid, channel_axis=axis))


def sensitivities(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Rise of the loss for each layer's weight and input."""
    nipq.prepare_(model, images[:1], nipq.Config(weight_bits=HIGH_BITS, activation_bits=HIGH_BITS))
    nipq.calibrate_(model, images.split(250), batches=8)
    set_phase_(model.eval(), "round")
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


def measure(cell: Record, data: Path, runs: Path) -> dict[str, Any]:
    """Sensitivities of one float cell."""
    config = check_config(cell["config"] | {"data": cell["config"]["data"] | {"path": str(data)}})
    weights = runs / cell["cell"]["name"] / "float.pt"
    model = build_model(config.model.model_copy(update={"weights": str(weights)})).eval()
    split = load_data(config.data, config.seed).validation
    assert split is not None
    batches = list(split)
    images = torch.cat([x for x, _ in batches])[:IMAGES]
    labels = torch.cat([y for _, y in batches])[:IMAGES]
    return sensitivities(model, images, labels)


def compared(network: str, seed: int, measured: dict[str, Any]) -> dict[str, Any]:
    """The correlations with the bits that each budget's cell of the same network and seed learned."""
    cells = [record for record in GRID.read().values() if record["cell"]["bits"] is not None]
    return {
        f"{record['cell']['bits']:g}": correlations(measured, record["learned_bits"])
        for record in sorted(cells, key=lambda record: str(record["cell"]["name"]))
        if (record["cell"]["network"], record["cell"]["seed"]) == (network, seed)
    }


def main() -> None:
    """Measure every float cell that is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the four idx files")
    parser.add_argument("--runs", type=Path, required=True, help="run folders of the grid")
    arguments = parser.parse_args()
    done = RESULTS.read()
    for cell in [record for record in GRID.read().values() if record["cell"]["bits"] is None]:
        network, seed = cell["cell"]["network"], cell["cell"]["seed"]
        if f"{network}-seed{seed}" in done:
            continue
        measured = measure(cell, arguments.data, arguments.runs)
        record = {
            "network": network,
            "seed": seed,
            "sensitivity": measured,
            "spearman": compared(network, seed, measured),
            "command": "python experiments/sensitivity/run.py --data FOLDER --runs RUNS",
            "machine": cell["machine"],
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("nipq", "torch", "scipy")},
            },
            "low_bits": LOW_BITS,
            "high_bits": HIGH_BITS,
            "images": IMAGES,
        }
        RESULTS.append(record)
        print(network, seed, json.dumps(record["spearman"]))


if __name__ == "__main__":
    main()
