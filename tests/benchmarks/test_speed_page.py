from __future__ import annotations

from typing import Any

import pytest

from benchmarks import record, speed_page
from benchmarks.goals import GOALS, goals_table

ORIGIN = {
    "command": "python -m benchmarks.x", "rounds": 3, "revision": "abc",
    "machine": {"processor": "P", "cores": 2, "load_before": None}, "versions": {"torch": "1"},
}  # fmt: skip


def row(median: float) -> dict[str, Any]:
    return {"milliseconds": [9.0, 10.0, 11.0], "ratio": [median - 0.1, median, median + 0.1]}


@pytest.fixture
def steps() -> dict[str, Any]:
    rows = {
        "float": {"contiguous": row(1.5), "channels_last": row(1.0)},
        "nipq": {"contiguous": row(1.7), "channels_last": row(1.2)},
        "nipq, ReLU not folded": {"channels_last": row(1.3)},
        "nipq, empirical noise": {"channels_last": row(1.8)},
    }
    kept = {f"{name} | {layout}": {"saved": 2**20, "peak": None} for name, found in rows.items() for layout in found}
    kept["nipq | channels_last"] = {"saved": 2**19, "peak": 2**20}
    network = {
        "shown": "MobileNet-v2", "batch": 2, "shape": [3, 8, 8], "notes": ["Brevitas: left out."],
        "reference": "channels_last", "memory": kept, "threads": {"1": rows, "2": rows},
    }  # fmt: skip
    return {**ORIGIN, "networks": {"mobilenet_v2": network}}


def test_a_network_has_one_line_for_each_variant_and_format(steps: dict[str, Any]) -> None:
    lines = speed_page.training_step(steps).splitlines()
    assert "| nipq | 1.20 (1.10 to 1.30) | 1.20 (1.10 to 1.30) | 0.50 |  |" in lines
    assert any(line.startswith("| nipq, contiguous | 1.70 ") for line in lines)
    assert any(
        line.startswith("**MobileNet-v2**, batch of 2 x 3 x 8 x 8, channels last; float: 10 ms on 1 thread, 10 ms on 2")
        and line.endswith("1 MiB saved. Brevitas: left out.")
        for line in lines
    )


def test_goals_are_compared_with_what_was_found(steps: dict[str, Any]) -> None:
    text = goals_table({"training_step": steps})
    assert "| MobileNet-v2, step / float step, one thread | 1.25 | 1.20 | reached |" in text
    assert "| MobileNet-v2, step with empirical noise / with uniform, one thread | 1.30 | 1.50 | **missed** |" in text
    assert "| MobileNet-v2, saved bytes / float's | 0.80 | 0.50 | reached |" in text
    assert "ResNet" not in text  # not measured
    assert "compiled" not in text


def test_a_goal_is_missed_by_what_is_shown_not_by_less() -> None:
    goal = next(goal for goal in GOALS if goal.file == "elements" and goal.digits == 0)
    content = {"fixed": {"nipq": [59.0, 60.4, 61.0]}}
    assert f"| {goal.name} | 60 | 60 | reached |" in goals_table({"elements": content})
    content["fixed"]["nipq"][1] = 60.6
    assert "| 61 | **missed** |" in goals_table({"elements": content})


def test_elements_show_their_limit_and_what_failed_stays_empty() -> None:
    one = {"forward": [1.0, 2.0, 3.0], "backward": [1.0, 3.0, 3.0], "ratio": [1.0, 1.25, 2.0], "kept": 4.0}
    limit = {"copy": [1.0, 1.5, 2.0], "add": [1.0, 2.5, 3.0]}
    case = {"elements": 64, "dtype": "float32", "threads": 1, "limit": limit, "notes": []}
    cases = [{**case, "rows": {"nipq": one}}, {**case, "dtype": "bfloat16", "threads": 2, "rows": {}}]
    text = speed_page.elements({**ORIGIN, "cases": cases, "fixed": {"nipq": [49.0, 50.0, 51.0]}})
    assert "|  | float32, 1 thread | bfloat16, 2 threads | kept, float32 |" in text
    assert "| copy + add | 1.5 + 2.5 | 1.5 + 2.5 |  |" in text
    assert "| nipq | 2 + 3: 1.25x |  | 4 |" in text
    assert "| nipq | 50 (49 to 51) |" in text


def test_compiled_and_many_quantizers() -> None:
    network = {
        "shown": "encoder", "layout": "contiguous",
        "rows": {name: row(1.1) for name in ("float, eager", "float", "nipq")},
        "compile_seconds": {"float": 10.2, "nipq": 20.0}, "saved": {"float": 100, "nipq": 150},
    }  # fmt: skip
    text = speed_page.compiled({**ORIGIN, "networks": {"encoder": network}})
    assert "| encoder, contiguous | 1.10 (1.00 to 1.20) | 1.10 (1.00 to 1.20) | 1.50 | 10 s | 20 s |" in text
    text = speed_page.many_quantizers({**ORIGIN, "microseconds": {"penalty": {"10": [1, 2, 3], "2000": [1, 250.4, 3]}}})
    assert "| microseconds for each of | 10 quantizers | 2,000 quantizers |" in text
    assert "| penalty | 2 | 250 |" in text


def test_a_block_says_when_nothing_was_measured(monkeypatch: pytest.MonkeyPatch, steps: dict[str, Any]) -> None:
    monkeypatch.setattr(record, "read", {"training_step": steps}.get)
    assert "MobileNet-v2" in speed_page.BLOCKS["speed-step"]()
    assert speed_page.BLOCKS["speed-elements"]() == "Nothing is measured yet.\n"
