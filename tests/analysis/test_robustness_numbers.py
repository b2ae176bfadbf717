"""The robustness experiment's table: where the reference has lost so much, and what the others have lost there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[2] / "experiments" / "robustness" / "robustness.py"


@pytest.fixture(scope="module")
def robustness():
    spec = importlib.util.spec_from_file_location("robustness", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(row, seed, scores, budget="3", higher=True):
    """A cell whose metric under weight noise of strength 0, 0.1, 0.2 is given, for two noise seeds a point apart."""
    points = [{"setting": {"kind": "none", "strength": 0.0, "seed": 0}, "scores": {"accuracy": scores[0]}}]
    points += [
        {"setting": {"kind": "weights", "strength": s, "seed": n}, "scores": {"accuracy": value - 0.5 + n}}
        for s, value in zip((0.1, 0.2), scores[1:], strict=True)
        for n in (0, 1)
    ]
    points.append({"setting": {"kind": "activations", "strength": 0.1, "seed": 0}, "scores": {"accuracy": 0.0}})
    return {
        "cell": {"row": row, "budget": budget, "seed": seed},
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": higher},
        "clean": {"accuracy": scores[0]},
        "perturbation": {"points": points},
    }


def test_losses_are_interpolated_where_the_mean_of_the_reference_has_lost_five(robustness) -> None:
    cells = [record("lsq", 0, (90, 88, 80)), record("lsq", 1, (90, 86, 78)), record("ours", 0, (91, 90, 88))]
    rows = robustness.rows_of(
        [*cells, record("float", 0, (92, 92, 92), budget=None), record("x", 0, (1, 1, 1), "4")], "3"
    )
    assert list(rows) == ["float", "lsq", "ours"]
    assert robustness.budgets(cells) == ["3"]
    found = robustness.drops(rows, robustness.perturbation_curve("weights"), "lsq", 5.0)
    assert found["strength"] == pytest.approx(0.125)  # mean losses 3 at 0.1 and 11 at 0.2
    assert found["lost"]["lsq"] == pytest.approx([4, 6])
    assert found["lost"]["ours"] == pytest.approx([1.5])
    assert found["lost"]["float"] == pytest.approx([0])


def test_a_reference_that_never_loses_so_much_sets_no_strength(robustness) -> None:
    rows = robustness.rows_of([record("lsq", 0, (90, 89, 88))], "3")
    curve = robustness.perturbation_curve("weights")
    assert robustness.drops(rows, curve, "lsq", 5.0) == {"strength": None, "lost": {}}
    assert robustness.drops(rows, curve, "absent", 5.0) == {"strength": None, "lost": {}}
    assert robustness.drops(rows, robustness.corruption_curve(), "lsq", 5.0) == {"strength": None, "lost": {}}


def test_where_lower_is_better_a_rise_is_a_loss(robustness) -> None:
    cell = record("lsq", 0, (1, 2, 4), higher=False)
    assert robustness.lost(cell, robustness.perturbation_curve("weights")(cell)) == {0.0: 0, 0.1: -1 * (1 - 2), 0.2: 3}


def test_interpolation_outside_what_was_measured_is_refused(robustness) -> None:
    assert robustness.value_at({0: 1.0, 2: 5.0}, 0.5) == 2.0
    with pytest.raises(ValueError, match="from 0 to 2, found 3"):
        robustness.value_at({0: 1.0, 2: 5.0}, 3)
    assert robustness.mean_curve([{0: 1.0, 1: 2.0}, {0: 3.0}]) == {0: 2.0}
