from __future__ import annotations

from benchmarks.integrations_page import overhead


def test_the_table_shows_shares_and_who_missed_the_goal() -> None:
    extras = {"quick": [-10.0, 50.0, 90.0], "noisy": [-10.0, 50.0, 101.0], "slow": [100.0, 120.0, 140.0]}
    rows = {name: {"extra_microseconds": extra, "milliseconds": [1.0, 2.0, 3.0]} for name, extra in extras.items()}
    content = {
        "command": "python -m benchmarks.integrations", "rounds": 3, "revision": "abc", "versions": {"torch": "1"},
        "machine": {"processor": "P", "cores": 2, "load_before": [5.0, 5.0, 5.0]}, "steps": 60,
        "rows": rows, "small_step": [4.0, 5.0, 6.0],
    }  # fmt: skip
    lines = overhead(content).splitlines()
    assert "% of a step of 5 ms" in lines[0]
    assert "| quick | 50 (-10 to 90) | 1.0 (-0.2 to 1.8) | yes | 2.00 (1.00 to 3.00) |" in lines
    assert "| noisy | 50 (-10 to 101) | 1.0 (-0.2 to 2.0) | not settled | 2.00 (1.00 to 3.00) |" in lines
    assert "| slow | 120 (100 to 140) | 2.4 (2.0 to 2.8) | **no** | 2.00 (1.00 to 3.00) |" in lines
    assert "60 steps each" in lines[-1]
    assert "busy with other work" in lines[-1]
