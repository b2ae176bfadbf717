"""Tables and pictures of the grids of this folder, from their committed cells; for ``experiments/write_results.py``."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.record import read as read_benchmark
from benchmarks.speed_page import number, span
from benchmarks.speed_page import origin as benchmark_origin
from experiments.shown import PICTURES, ROOT, Record, lines_of, origin, picture, spread, table
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_
from nipq.train.compare import FLOAT, expand, load_grid
from nipq.train.compare_plots import plot_comparison
from nipq.train.compare_table import Comparison, compare, final_state, interval, markdown
from nipq.train.config import ModelConfig
from nipq.train.factory import build_model
from nipq.train.records import Records

HERE = Path(__file__).parent
#: Names of the grids' files, without ending.
MAIN, BOPS, WEIGHTS, ABLATIONS = "fashion_mobilenet_v2", "fashion_bops", "fashion_weights_only", "fashion_ablations"
LEVELS = "fashion_weight_levels"


def records_of(grid: Path) -> dict[str, Record]:
    """Committed cells of a grid by name.

    Args:
        grid: its file; the cells lie in ``results`` beside it.
    """
    return Records(grid.parent / "results" / f"{grid.stem}.jsonl").read()


def compared(grid: Path) -> Comparison:
    """The comparison of a grid's committed cells.

    Args:
        grid: its file.
    """
    loaded = load_grid(grid)
    return compare(loaded, expand(loaded), records_of(grid))


def readme(budget: str = "3/3") -> str:
    """Five rows of the main grid: float, nipq, the best other method, LSQ and PACT.

    Args:
        budget: the label of the budget.
    """
    comparison = compared(HERE / f"{MAIN}.yaml")
    block = next(block for block in comparison.blocks if block.budget == budget)
    assert comparison.float_row is not None
    assert block.verdict is not None
    rows = {row.label: row for row in block.rows}
    shown = {"float": comparison.float_row, "nipq": rows["nipq"]}
    shown |= {
        f"best other: {block.verdict.other}": rows[block.verdict.other],
        "LSQ": rows["lsq"],
        "PACT": rows["pact"],
    }
    lines = [
        [
            name,
            interval(row.score, 2),
            interval(row.to_float, 2, sign=True),
            "32" if row.weight_bits is None else f"{row.weight_bits:.2f} / {row.activation_bits:.2f}",
            len(row.seeds),
        ]
        for name, row in shown.items()
    ]
    difference = interval(block.verdict.difference, 2, sign=True)
    return (
        table(["Fashion-MNIST, MobileNet-v2", "test accuracy [%]", "minus float", "bits W / A", "seeds"], lines)
        + f"\nMean and 95 % interval over seeds; nipq minus the best other, paired by seed: {difference} points. "
        "46 thousand weights, trained on 20,000 images; same float start, teacher, epochs and average bits for all.\n"
    )


def grid_section(grid: Path, *, pictures: bool = False) -> str:
    """Tables of a grid, one for each budget, and how they were made.

    Args:
        grid: its file.
        pictures: whether pictures of it are among the committed ones.
    """
    cells = expand(load_grid(grid))
    records = list(records_of(grid).values())
    text = markdown(compared(grid), cost=False).split("\n", 2)[2]
    text = "\n".join(f"**{line[3:]}**" if line.startswith("## ") else line for line in text.splitlines())
    hours = sum(record["results"]["seconds"] for record in records) / 3600
    place = grid.relative_to(ROOT).as_posix()
    found = sorted(PICTURES.glob(f"{grid.stem}_*.png")) if pictures else []
    return (
        f"{text}\n\n{len(records)} of {len(cells)} cells, {hours:.1f} hours on one thread each, on a busy machine: "
        f"`nipq compare {place} --run RUNS --data FOLDER`; {origin(records)}.\n"
        + "".join(f"\n{picture(path.stem, _shows(path.stem))}\n" for path in found)
    )


def _shows(name: str) -> str:
    return "accuracy against bit-operations" if name.endswith("bops") else "accuracy of each method"


def draw() -> None:
    """Pictures of the main grid, and of the one whose budgets are operations."""
    with tempfile.TemporaryDirectory() as folder:
        for name, wanted in ((MAIN, ("accuracy", "accuracy_against_bops")), (BOPS, ("accuracy_against_bops",))):
            for path in plot_comparison(compared(HERE / f"{name}.yaml"), Path(folder)):
                if path.stem in wanted:
                    (PICTURES / f"{name}_{path.stem}.png").write_bytes(path.read_bytes())


def validation() -> str:
    """The rows of the ablations by their validation score, the first seed of each."""
    rows = []
    for record in records_of(HERE / f"{ABLATIONS}.yaml").values():
        if record["cell"]["seed"] == 0:
            last = list(record["results"]["states"].values())[-1]
            rows.append((record["cell"]["row"], *(last[split]["accuracy"] for split in ("validation", "test"))))
    base = next(row for row in rows if row[0] == "nipq")
    lines = [
        [row, f"{scores[0]:.2f}", *(f"{score - of:+.2f}" for score, of in zip(scores, base[1:], strict=True))]
        for row, *scores in sorted(rows, key=lambda row: -row[1])
    ]
    return (
        table(["row", "validation accuracy [%]", "minus nipq", "the same on the test images"], lines)
        + "\nSeed 0; 5,000 validation images. Whether a part is kept is judged by these, not by the test images.\n"
    )


def ends(budget: str = "3/3") -> str:
    """Average bits of every row with learned bits at the end of its search, before the freeze.

    Args:
        budget: the label of the budget.
    """
    grid = load_grid(HERE / f"{MAIN}.yaml")
    model = prepare_(build_model(ModelConfig.model_validate(grid.base["model"])), torch.zeros(1, 1, 28, 28))
    counts = {row.spec.name: (row.spec.weight_count, row.spec.activation_count) for row in layer_table(model)}
    found: dict[str, list[list[float]]] = {}
    for name in (MAIN, ABLATIONS):
        for record in records_of(HERE / f"{name}.yaml").values():
            if record["cell"]["budget"] == budget and record["learned_bits"]:
                found.setdefault(record["cell"]["row"], []).append(_averages(record["learned_bits"], counts))
    lines = []
    for row, those in found.items():
        weights, inputs = (statistics.mean(side) for side in zip(*those, strict=True))
        if max(weights, inputs) > 3.05:
            lines.append([row, str(len(those)), f"{weights:.2f}", f"{inputs:.2f}"])
    return (
        table(["row", "seeds", "average weight bits", "average input bits"], lines)
        + f"\nAt the end of the search, of the continuous bit-widths; budget {budget}. The freeze cuts them to the "
        "budget at once. All other rows with learned bits were within 0.05 of it.\n"
    )


def _averages(bits: dict[str, list[float]], counts: dict[str, tuple[int, int]]) -> list[float]:
    """Weights' and inputs' average bits over elements; the image, with its 8 fixed bits, is not among the inputs."""
    first = next(iter(bits))
    sides = []
    for side in (0, 1):
        those = [(bits[layer][side], counts[layer][side]) for layer in bits if not (side and layer == first)]
        sides.append(sum(b * n for b, n in those) / sum(n for _, n in those))
    return sides


def costs() -> str:
    """Time of a training step of each method."""
    content = read_benchmark("methods")
    if content is None:
        return "Nothing is measured yet.\n"
    rows = [[word, number(row["milliseconds"]), span(row["ratio"])] for word, row in content["rows"].items()]
    return (
        table(["method", "step, ms", "float step"], rows)
        + f"\nThe network of the first grid, {content['batch']} images, without a teacher; CPU time on one thread, "
        f"median (quartiles) of the ratios within a round. {benchmark_origin(content)}\n"
        + picture("speed_methods", "training cost")
        + "\n"
    )


def calibrated_anew() -> str:
    """Cells of the first grid, trained again after calibration was mended, beside those of the table."""
    first = records_of(HERE / f"{MAIN}.yaml")
    again = lines_of(HERE / "results" / "calibration_fix.jsonl")
    new, old = (
        [record["results"]["states"]["finetuned"]["test"]["accuracy"] for record in records]
        for records in (again, [first[record["cell"]["name"]] for record in again])
    )
    return (
        f"nipq at 3/3, {len(new)} seeds, trained anew with today's calibration (and today's kernels): {spread(new)} % "
        f"instead of {spread(old)} %, mean and standard deviation on the test images. Records in "
        "`experiments/baselines/results/calibration_fix.jsonl`, made like those of the first grid.\n"
    )


def candidates(path: Path) -> str:
    """The settings that ``experiments/tune.py`` tried, with their validation scores.

    Args:
        path: the file of records.
    """
    records = lines_of(path)
    metric = next(name for name in records[0]["validation"]["float"] if name not in ("loss", "count"))
    unit, digits = (" [%]", 2) if metric == "accuracy" else ("", 4)
    rows = []
    for record in records:
        states = record["validation"]
        last = states[final_state(states, is_float=record["method"] == FLOAT)]
        fields = f"`{json.dumps(record['fields'])}`" if record["fields"] else ""
        rows.append([record["method"], fields, f"{last[metric]:.{digits}f}", f"{last['loss']:.4f}"])
    return table(["method", "fields", f"validation {metric}{unit}", "validation loss"], rows)


def tuning() -> str:
    """The candidates of ``candidates.yaml`` and the choice."""
    return (
        candidates(HERE / "results" / "tuning.jsonl")
        + "\nSeed 0, budget 3/3, 5,000 validation images (standard error about 0.45 points, so most candidates are "
        "level). Chosen for all rows: learning rate 0.05, four epochs and one; other fields are the grid's. "
        "More was tried for the noise proxy than for LSQ: its start of bits came out of this table. The last of LSQ "
        "and the last four of nipq, the first of them the default once more, came after calibration was mended: on "
        "this network the cut of the epochs makes no difference; on MobileNet-v3 it does. "
        "`python experiments/tune.py experiments/baselines/candidates.yaml --data FOLDER --runs RUNS`.\n"
    )


#: Blocks of the pages by name.
BLOCKS: dict[str, Callable[[], str]] = {
    "readme": readme,
    "fashion-baselines": partial(grid_section, HERE / f"{MAIN}.yaml", pictures=True),
    "fashion-bops": partial(grid_section, HERE / f"{BOPS}.yaml", pictures=True),
    "fashion-weights-only": partial(grid_section, HERE / f"{WEIGHTS}.yaml"),
    "fashion-weight-levels": partial(grid_section, HERE / f"{LEVELS}.yaml"),
    "fashion-ablations": partial(grid_section, HERE / f"{ABLATIONS}.yaml"),
    "fashion-ablations-validation": validation,
    "searches-off-budget": ends,
    "calibration-fix": calibrated_anew,
    "baseline-candidates": tuning,
    "speed-methods": costs,
}
