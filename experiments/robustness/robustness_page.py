"""The results part of docs/robustness.md; ``experiments/write_results.py`` calls it."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def page() -> str:
    """Table, pictures and how they were made; ``ROOT`` stands for the way to the repository's root."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "cells").glob("*.json"))]
    if not records:
        return "Nothing is measured yet.\n"
    first = records[0]
    settings = first["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    pictures = "\n\n".join(
        f"![{path.stem}](ROOT/experiments/robustness/results/{path.name})" for path in sorted(RESULTS.glob("*.png"))
    )
    sizes = f"--images {settings['images']} --train-images {settings['train_images']}"
    return (
        f"{(RESULTS / 'table.md').read_text(encoding='utf-8')}\n"
        f"{len(records)} networks, mean ± standard deviation where there are several seeds, "
        f"on {settings['images']} test images; curvature on {settings['train_images']} training images. "
        f"`python experiments/robustness/run.py --runs RUNS {sizes}`, then `experiments/robustness/plot.py` and "
        f"`experiments/robustness/table.py`; {versions}.\n\n"
        f"{pictures}\n"
    )
