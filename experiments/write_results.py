"""Write the results into README.md and docs/ from the committed result files; no table is typed by hand.

python experiments/write_results.py            # rewrites them
python experiments/write_results.py --check    # fails if they do not match the result files
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "fashion_mnist"), str(HERE / "rivals"), str(HERE / "robustness"), str(ROOT)]

import rivals_page  # noqa: E402  (scripts beside their results, not a package)
import robustness_page  # noqa: E402
import table as fashion  # noqa: E402
from grid import EPOCHS  # noqa: E402

from benchmarks import integrations_page, scale_page, speed_page  # noqa: E402
from experiments.export import page as export_page  # noqa: E402
from experiments.tasks import tasks_page  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def read(path: str) -> dict[str, Any] | None:
    """A result file below ``experiments``, or None when that experiment was not run."""
    place = HERE / path
    return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None


def where(record: dict[str, Any]) -> str:
    """Machine and versions on one line."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{record['machine'].get('processor') or 'CPU'}, {record['machine']['cores']} cores; {versions}"


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def demo_section() -> str:
    """Digits: what ``nipq demo`` promises, over seeds."""
    record = read("demo/results/demo.json")
    if record is None:
        return ""
    runs = record["runs"]
    score = {
        state: [run["states"][state]["test"]["accuracy"] for run in runs]
        for state in ("float", "frozen", "bn", "finetuned")
    }
    most = [max(run["average_bits"][side] for run in runs) for side in ("weights", "activations")]
    kept = sum(all(run["promises"].values()) for run in runs)
    return (
        "### Digits, 4.0 / 4.0 average bits (`nipq demo`)\n\n"
        "| seeds | float | frozen | + BN re-estimated | + fine-tuned | average bits W/A, at most | every promise kept "
        "| wall time, at most |\n"
        "|---|---|---|---|---|---|---|---|\n"
        f"| {len(runs)} | "
        + " | ".join(spread(values) for values in score.values())
        + f" | {most[0]:.3f}/{most[1]:.3f} | "
        f"{kept} of {len(runs)} | {max(run['wall_seconds'] for run in runs):.0f} s |\n\n"
        f"Test accuracy in per cent, mean ± standard deviation. `{record['command']}`; {where(record)}.\n"
    )


def fashion_section() -> str:
    """Fashion-MNIST: two networks, three budgets."""
    cells = fashion.load_cells()
    if not fashion.rows(cells):
        return ""
    seconds = sum(cell["results"]["seconds"] for cell in cells)
    epochs = "; ".join(f"{network} {a}, {b}, {c}" for network, (a, b, c) in EPOCHS.items())
    return (
        "### Fashion-MNIST, a small MobileNet-v2 and ResNet-18\n\n"
        + fashion.table(cells)
        + "\nTest accuracy in per cent at the last epoch, mean ± standard deviation over seeds; minus float with "
        "its standard error, paired by seed. First and last layers are learned and counted; the 8-bit input is not "
        "counted. Every cell starts from, and is taught by, its seed's float network. Epochs of float training, search "
        f"under noise and fine-tuning with rounding: {epochs}; made before calibration was mended (CHANGELOG), with "
        "bits that start in the middle of their range; the quantized networks have trained longer than "
        "the float ones, so a positive difference is not a gain from quantization. "
        f"{len(cells)} cells, {seconds / 3600:.1f} hours on one thread each: "
        f"`{cells[0]['command']}`; {where(cells[0])}.\n\n"
        "![accuracy against average bits](ROOT/experiments/fashion_mnist/results/accuracy.png)\n"
    )


def sensitivity_section() -> str:
    """T13: learned bits against one-layer-at-a-time sensitivity."""
    record = read("sensitivity/results/sensitivity.json")
    if record is None:
        return ""
    headings = ("network", "budget", "seeds", "weights", "inputs", "weights, by the loss", "inputs, by the loss")
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for network in sorted({cell["network"] for cell in record["cells"]}):
        cells = [cell for cell in record["cells"] if cell["network"] == network]
        for bits in sorted(cells[0]["spearman"], key=float, reverse=True):
            found = [cell["spearman"][bits] for cell in cells if bits in cell["spearman"]]
            shown = [
                spread([entry[kind][measure]["rho"] for entry in found])
                for measure in ("divergence", "rise")
                for kind in ("weight", "activation")
            ]
            lines.append(f"| {network} | {bits}/{bits} | {len(found)} | {' | '.join(shown)} |")
    return (
        "### Learned bits against one-layer-at-a-time sensitivity (T13)\n\n"
        + "\n".join(lines)
        + "\n\nSpearman's rank correlation over the layers of one network between the learned (soft) bits and a "
        "tensor's sensitivity per element: the Kullback-Leibler divergence of the answers (in the last two columns the "
        f"rise of the loss) when that tensor alone has {record['low_bits']} bits and all others "
        f"{record['high_bits']}, on {record['images']:,} validation images. `{record['command']}`; {where(record)}.\n\n"
        "![learned bits against sensitivity](ROOT/experiments/sensitivity/results/sensitivity.png)\n"
    )


def overshoot_section() -> str:
    """Budgets: how often the snap exceeded one."""
    record = read("snap_overshoot/results/overshoot.json")
    if record is None:
        return ""
    return (
        "### Budgets are never exceeded\n\n"
        f"{record['pairs']} random pairs of model and budget: {record['overshoots']} above the budget. "
        f"`{record['command']}`; {where(record)}.\n"
    )


def sections() -> str:
    """All sections that have results; ``ROOT`` stands for the way to the repository's root."""
    return "\n".join(
        part for part in (demo_section(), fashion_section(), sensitivity_section(), overshoot_section()) if part
    )


def filled(path: Path, results: str) -> str:
    """A page with new results between its markers; ``ROOT`` in them stands for the way to the repository's root."""
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    way = "../" * (len(path.relative_to(ROOT).parts) - 1)
    return f"{head}{BEGIN}\n{results.replace('ROOT/', way)}{END}{rest.split(END)[1]}"


def documents() -> dict[Path, str]:
    """New text of every document that shows results."""
    short = "\n".join(part for part in (demo_section(), fashion_section(), rivals_page.headline()) if part)
    pages = {
        "README.md": f"{short}\nAll results: [docs/results.md](docs/results.md).\n",
        "docs/integrations.md": integrations_page.page(),
        "docs/rivals.md": rivals_page.page(),
        "docs/robustness.md": robustness_page.page(),
        "docs/scale.md": scale_page.page(),
        "docs/speed.md": speed_page.page(),
        "docs/tasks.md": tasks_page.page(),
    } | export_page.pages()
    head = "# Results\n\nWritten by `python experiments/write_results.py` from the committed result files.\n\n"
    return {ROOT / name: filled(ROOT / name, results) for name, results in pages.items()} | {
        ROOT / "docs" / "results.md": head + sections().replace("ROOT/", "../")
    }


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a document is out of date")
    arguments = parser.parse_args()
    stale = [
        path for path, text in documents().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} does not match the result files; run python experiments/write_results.py")
        return 1 if stale else 0
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
