"""Table and picture of learned bits against sensitivity, from the records; for ``experiments/write_results.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.shown import PICTURES, lines_of, origin, picture, spread, table

HERE = Path(__file__).parent
KINDS = ("weight", "activation")


def section() -> str:
    """T13: learned bits against one-layer-at-a-time sensitivity."""
    records = lines_of(HERE / "results.jsonl")
    first, rows = records[0], []
    for network in sorted({record["network"] for record in records}):
        cells = [record["spearman"] for record in records if record["network"] == network]
        for bits in sorted(cells[0], key=float, reverse=True):
            found = [cell[bits] for cell in cells if bits in cell]
            shown = [
                spread([entry[kind][measure]["rho"] for entry in found])
                for measure in ("divergence", "rise")
                for kind in KINDS
            ]
            rows.append([network, f"{bits}/{bits}", len(found), *shown])
    headings = ["network", "budget", "seeds", "weights", "inputs", "weights, by the loss", "inputs, by the loss"]
    return (
        table(headings, rows)
        + "\nSpearman's rank correlation over the layers of one network between the learned (soft) bits and a "
        "tensor's sensitivity per element: the Kullback-Leibler divergence of the answers (in the last two columns the "
        f"rise of the loss) when that tensor alone has {first['low_bits']} bits and all others "
        f"{first['high_bits']}, on {first['images']:,} validation images. `{first['command']}`; "
        f"{origin(records)}.\n\n" + picture("sensitivity_bits", "learned bits against sensitivity") + "\n"
    )


def draw(bits: str = "3") -> None:
    """Learned bits against sensitivity per element, one panel for each network and kind, seed 0.

    Args:
        bits: the budget.
    """
    cells = {cell["cell"]["name"]: cell for cell in lines_of(HERE.parent / "fashion_mnist" / "results.jsonl")}
    shown = [record for record in lines_of(HERE / "results.jsonl") if record["seed"] == 0]
    figure, axes = plt.subplots(len(shown), 2, figsize=(10, 3.8 * len(shown)), squeeze=False, layout="constrained")
    for line, record in zip(axes, shown, strict=True):
        learned = cells[f"{record['network']}-{bits}bit-seed0"]["learned_bits"]
        for index, (axis, kind) in enumerate(zip(line, KINDS, strict=True)):
            names = [name for name, entry in record["sensitivity"].items() if kind in entry]
            measured = [record["sensitivity"][name][kind] for name in names]
            xs = [entry["divergence"] / entry["count"] for entry in measured]
            rho = record["spearman"][bits][kind]["divergence"]["rho"]
            axis.scatter(xs, [learned[name][index] for name in names], c="#2166ac", s=26)
            axis.set_xscale("log")
            axis.set(
                title=f"{record['network']}, {kind}s: Spearman {rho:+.2f}",
                xlabel=f"divergence of the answers at {record['low_bits']} bits, per element [nat]",
                ylabel=f"learned bits (budget {bits}/{bits})",
            )
            axis.grid(alpha=0.3)
    figure.savefig(PICTURES / "sensitivity_bits.png", dpi=120)
    plt.close(figure)


#: Blocks of the pages by name.
BLOCKS = {"sensitivity": section}
