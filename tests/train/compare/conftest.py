"""A small grid, and records of cells that nobody had to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nipq.train.compare import Grid, cell_name

TREE: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "model": {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}},
        "data": {"kind": "digits", "batch_size": 64, "train_limit": 128},
        "stages": {"float": {"epochs": 1}, "search": {"epochs": 1}},
        "batchnorm_batches": 1,
        "calibration_batches": 1,
        "device": "cpu",
        "threads": 1,
    },
    "budgets": {"4/4": {"average_bits": {"weights": 4, "activations": 4}}},
    "methods": {"ours": {"method": "nipq"}, "rival": {"method": "nipq", "label_smoothing": 0.1}},
    "seeds": [0, 1],
}


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The tiny grid as its file would say it."""
    return TREE


@pytest.fixture
def make_grid() -> Callable[..., Grid]:
    """Build the tiny grid with some fields replaced."""
    return lambda **changes: Grid.model_validate({**TREE, **changes})


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Make the record of a cell: row, budget, seed, score, and what else it should say."""
    return made_up_record


def made_up_record(
    row: str,
    budget: str | None,
    seed: int,
    score: float,
    *,
    bops: float = 2e6,
    size: float = 5000.0,
    bits: float = 4.0,
    seconds: float = 0.2,
    verified: bool = True,
    metric: dict[str, Any] | None = None,
    state: str = "finetuned",
) -> dict[str, Any]:
    """The record of a finished cell; other states than the last one score 0."""
    name = "accuracy" if metric is None else metric["name"]
    states = ["float"] if budget is None else ["float", "frozen", "bn", "finetuned"]
    states = states[: states.index(state) + 1] if state in states else states
    scores = {entry: {"test": {name: 0.0, "loss": 1.0}, "validation": {name: 99.9}} for entry in states}
    scores[states[-1]]["test"][name] = score
    results = {
        "states": scores,
        "average_bits": {"weights": bits, "activations": bits},
        "bytes": {"file": size, "float32": 32000.0},
        "verified": verified,
    }
    if metric is not None:
        results["metric"] = metric
    return {
        "cell": {"name": cell_name(row, budget, seed), "row": row, "budget": budget, "seed": seed},
        "config": {},
        "results": results,
        "bops": bops,
        "seconds_per_step": {"overall": 0.1 if budget is None else seconds},
    }
