"""Tables of the tasks on real data, from the committed cells of their grids; for ``experiments/write_results.py``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.rivals.page import HERE as RIVALS
from experiments.rivals.page import MAIN, candidates, compared, grid_section, records_of
from experiments.shown import table
from nipq.train.compare_table import interval, prefixed

HERE = Path(__file__).parent
FASHION = RIVALS / f"{MAIN}.yaml"
GRIDS = [HERE / f"{path.stem}.yaml" for path in sorted(HERE.glob("results/*.jsonl")) if "_tuning" not in path.stem]
TUNED = [path.stem.removesuffix("_tuning") for path in sorted(HERE.glob("results/*_tuning.jsonl"))]


def overview() -> str:
    """One line for each task and budget: the float network, ours, LSQ, and the best other method."""
    lines = []
    for path in GRIDS:
        comparison = compared(path)
        digits = 2 if comparison.metric.unit in ("%", "dB") else 4
        for block in comparison.blocks:
            rows = {row.label: row for row in block.rows}
            if comparison.float_row is None or block.verdict is None:
                continue
            other = rows[block.verdict.other]
            shown = (comparison.float_row, rows["nipq"], rows.get("lsq"))
            direction = "" if comparison.metric.higher_is_better else ", lower is better"
            lines.append([
                comparison.name, block.budget, comparison.metric.title + direction, str(len(rows["nipq"].seeds)),
                *("-" if row is None else interval(row.score, digits) for row in shown),
                f"{other.label}: {interval(other.score, digits)}",
                interval(block.verdict.difference, digits, sign=True),
            ])  # fmt: skip
    headings = [
        "task", "budget", "score", "seeds", "float", "nipq", "lsq", "best other method", "nipq minus best other method",
    ]  # fmt: skip
    return table(headings, lines) + "\nTest split, last state; mean and 95 % interval where there are several seeds.\n"


#: Rows of the short table: grid, budget, the names of task and network, and the decimals of its score.
SHORT = (
    (FASHION, "4/4", "Fashion-MNIST", "MobileNet-v2, small", 2),
    (FASHION, "3/3", "Fashion-MNIST", "MobileNet-v2, small", 2),
    (HERE / "which_photo_mobilenet_v3.yaml", "3/3", "which of 71 photos?", "MobileNet-v3, small", 2),
    (HERE / "super_resolution.yaml", "3/3", "x2 super-resolution", "EDSR, small", 2),
    (HERE / "minilm_sentiment.yaml", "4/4", "sentiment of film reviews", "MiniLM, 23 million", 2),
)


def short() -> str:
    """Five rows for a first impression: float, nipq and LSQ on four tasks, with bytes."""
    lines = []
    for path, budget, task, network, digits in SHORT:
        comparison = compared(path)
        block = next(block for block in comparison.blocks if block.budget == budget)
        rows = {row.label: row for row in block.rows}
        start, ours = comparison.float_row, rows["nipq"]
        assert start is not None
        scores = [interval(row.score, digits) for row in (start, ours, rows["lsq"])]
        size = f"{prefixed(start.file_bytes)} → {prefixed(ours.file_bytes)}"
        lines.append([f"{task}, {comparison.metric.title}", network, budget, *scores, len(ours.seeds), size])
    headings = ["task", "network", "bits W/A", "float", "nipq", "LSQ, one bit-width", "seeds", "bytes, float → packed"]
    return table(headings, lines) + "\nTest split, last state; mean and 95 % interval where there are several seeds.\n"


def tuning(name: str) -> str:
    """The candidates that were tried on the validation samples before a grid ran.

    Args:
        name: of the file of candidates, without ``_candidates.yaml``.
    """
    return (
        f"{candidates(HERE / 'results' / f'{name}_tuning.jsonl')}\nValidation samples of one seed: "
        f"`python experiments/tune.py experiments/tasks/{name}_candidates.yaml --data FOLDER --runs RUNS`.\n"
    )


def stages(path: Path, budget: str) -> str:
    """Bits at the end of each row's search, and the scores after the freeze and after the fine-tuning.

    Args:
        path: the grid's file.
        budget: the label of the budget.
    """
    rows: dict[str, list[list[float]]] = {}
    metric = compared(path).metric
    for record in records_of(path).values():
        if record["cell"]["budget"] == budget:
            # Embedding tables have no input to quantize, and 8 fixed bits.
            of_weights = [bits[0] for bits in record["learned_bits"].values() if bits[1] is not None]
            states = record["results"]["states"]
            scores = [states[state]["test"][metric.name] for state in ("frozen", "finetuned")]
            rows.setdefault(record["cell"]["row"], []).append([statistics.mean(of_weights), *scores])
    lines = []
    for row, those in rows.items():
        bits, frozen, tuned = map(statistics.mean, zip(*those, strict=True))
        lines.append([row, str(len(those)), f"{bits:.2f}", f"{frozen:.4f}", f"{tuned:.4f}"])
    headings = ["row", "seeds", "weight bits where the search ends", f"{metric.title}, frozen"]
    return (
        table([*headings, f"{metric.title}, fine-tuned"], lines)
        + f"\nBudget {budget}. Bits are the continuous ones, a mean over the linear layers; scores those of the test "
        "split.\n"
    )


#: Blocks of the pages by name: ``tasks-summary``, ``task-<grid>``, ``task-decoder-stages``, ``candidates-<name>``.
BLOCKS: dict[str, Callable[[], str]] = {"tasks-summary": overview, "readme-tasks": short}
BLOCKS |= {
    f"task-{path.stem.replace('minilm_topics', 'newsgroups').replace('_', '-')}": partial(grid_section, path)
    for path in GRIDS
}
BLOCKS |= {"task-decoder-stages": partial(stages, HERE / "decoder.yaml", "4/8")}
BLOCKS |= {f"candidates-{name.replace('_', '-')}": partial(tuning, name) for name in TUNED}
