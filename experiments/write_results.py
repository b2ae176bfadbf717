"""Write the results into the documents from the committed result files; no table is typed by hand.

    python experiments/write_results.py               # rewrites every block
    python experiments/write_results.py --check       # fails if a document does not match the result files
    python experiments/write_results.py --pictures    # draws docs/results/pictures anew, too
    python experiments/write_results.py --blocks      # names the blocks, and the pages that show them

A block stands in any Markdown page of the repository, between the lines ``<!-- results:NAME:begin -->`` and
``<!-- results:NAME:end -->``, once or several times. Names, by what they show:

    readme                                five rows: float, nipq, the best other, LSQ, PACT at 3/3 on Fashion-MNIST
    readme-tasks                          five rows: one for each of five tasks and budgets, float, nipq and LSQ
    front-door, post-training             the two calls: the README's training loop, and nipq.quantize
    digits, fashion-mnist, sensitivity, budgets-kept, oscillation
    fashion-baselines, fashion-bops, fashion-weights-only, fashion-weight-levels,
    fashion-ablations                     one table for each budget of a grid
    fashion-ablations-validation, searches-off-budget, calibration-fix, baseline-candidates
    tasks-summary                         one line for each task and budget
    task-decoder, task-detection, task-efficientnet-lite0, task-minilm-rating, task-minilm-rating-8bit,
    task-minilm-sentiment, task-minilm-sentiment-8bit, task-newsgroups, task-newsgroups-8bit, task-super-resolution,
    task-which-photo-mobilenet-v3, task-which-photo-resnet18        the grid of a task
    task-decoder-stages, candidates-minilm, candidates-minilm-topics, candidates-mobilenet-v3
    robustness, robustness-pictures
    speed-goals, speed-step, speed-compiled, speed-elements, speed-quantizers, speed-integrations, speed-methods
    scale-measured, scale-decoder
    export-runtimes, export-sizes, verify-random, verify-trained, latency-openvino, latency-inductor
    hardening                             trials of damaged files, bad configs, random networks and killed runs
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import integrations_page, plots, scale_page, speed_page  # noqa: E402  (found through the line above)
from experiments.baselines import page as baselines_page  # noqa: E402
from experiments.baselines import readme_picture  # noqa: E402
from experiments.demo import page as demo_page  # noqa: E402
from experiments.export import page as export_page  # noqa: E402
from experiments.fashion_mnist import page as fashion_page  # noqa: E402
from experiments.freeze_overshoot import page as overshoot_page  # noqa: E402
from experiments.front_door import page as front_door_page  # noqa: E402
from experiments.hardening import page as hardening_page  # noqa: E402
from experiments.post_training import page as post_training_page  # noqa: E402
from experiments.robustness import page as robustness_page  # noqa: E402
from experiments.robustness import plot as robustness_plot  # noqa: E402
from experiments.scalar_toy import page as toy_page  # noqa: E402
from experiments.sensitivity import page as sensitivity_page  # noqa: E402
from experiments.shown import PICTURES  # noqa: E402
from experiments.tasks import page as tasks_page  # noqa: E402

BLOCKS: dict[str, Callable[[], str]] = {
    **front_door_page.BLOCKS,
    **post_training_page.BLOCKS,
    **baselines_page.BLOCKS,
    **fashion_page.BLOCKS,
    **demo_page.BLOCKS,
    **sensitivity_page.BLOCKS,
    **overshoot_page.BLOCKS,
    **toy_page.BLOCKS,
    **tasks_page.BLOCKS,
    **robustness_page.BLOCKS,
    **speed_page.BLOCKS,
    **integrations_page.BLOCKS,
    **scale_page.BLOCKS,
    **export_page.BLOCKS,
    **hardening_page.BLOCKS,
}
#: Functions that draw pictures from the result files. The scalar toy's comes with its training.
PAINTERS = (
    readme_picture.draw,
    baselines_page.draw,
    fashion_page.draw,
    sensitivity_page.draw,
    robustness_plot.draw,
    plots.main,
)

BLOCK = re.compile(r"(<!-- results:([\w-]+):begin -->\n)(.*?)(<!-- results:([\w-]+):end -->)", flags=re.DOTALL)
MARK = re.compile(r"^<!-- results:([\w-]+):(begin|end) -->$", flags=re.MULTILINE)


def pages() -> Iterator[Path]:
    """Every Markdown page that may hold a block."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "experiments").glob("*/README.md"))
    yield from sorted((ROOT / "benchmarks").glob("README.md"))


@cache
def block(name: str) -> str:
    """Text of a block; ``ROOT/`` in it stands for the way to the repository's root."""
    return BLOCKS[name]()


def filled(path: Path, text: str) -> str:
    """A page with new text in its blocks.

    Args:
        path: of the page; pictures are linked relative to it.
        text: of the page.

    Raises:
        ValueError: if a block is unknown, or its markers are no pair.
    """
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    marks = MARK.findall(text)
    for (first, kind), (second, other) in zip(marks[::2], [*marks[1::2], ("", "")], strict=False):
        if (kind, other) != ("begin", "end") or first != second:
            raise ValueError(f"{shown}: expected a begin and an end of results:{first}, found no such pair")
        if first not in BLOCKS:
            raise ValueError(f"{shown}: expected a known block, found results:{first}; there are {', '.join(BLOCKS)}")

    def place(match: re.Match[str]) -> str:
        def linked(link: re.Match[str]) -> str:
            return f"]({Path(os.path.relpath(ROOT / link[1], path.parent)).as_posix()})"

        return match[1] + re.sub(r"\]\(ROOT/([^)]+)\)", linked, block(match[2])) + match[4]

    return BLOCK.sub(place, text)


def used() -> dict[str, list[Path]]:
    """Pages of each block."""
    found: dict[str, list[Path]] = {name: [] for name in BLOCKS}
    for path in pages():
        for name in dict.fromkeys(name for name, _ in MARK.findall(path.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append(path.relative_to(ROOT))
    return found


def main() -> int:
    """Write, check, or list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a document is out of date")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures, too")
    parser.add_argument("--blocks", action="store_true", help="list the blocks and their pages, and stop")
    arguments = parser.parse_args()
    if arguments.blocks:
        for name, places in used().items():
            print(f"{name}: {', '.join(map(str, places)) or '(on no page)'}")
        return 0
    if arguments.pictures:
        PICTURES.mkdir(parents=True, exist_ok=True)
        for paint in PAINTERS:
            paint()
    stale = 0
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(path, text)
        if new != text and arguments.check:
            print(f"{path.relative_to(ROOT)} does not match the result files; run python experiments/write_results.py")
            stale += 1
        elif new != text:
            path.write_text(new, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
