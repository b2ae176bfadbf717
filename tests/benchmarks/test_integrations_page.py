from __future__ import annotations

from typing import Any

from benchmarks.integrations_page import overhead


def test_the_table_shows_shares_and_who_missed_the_goal() -> None:
    rows: dict[str, Any] = {
        "plain loop": {
            "ratio": [1.0, 1.004, 1.01],
            "extra_microseconds": [0.0, 32.0, 80.0],
            "trainer": [1.0, 1.0, 1.0],
        },
        "Lightning": {
            "ratio": [1.0, 1.02, 1.05],
            "extra_microseconds": [0.0, 160.0, 400.0],
            "trainer": [1.1, 1.2, 1.3],
        },
    }
    content = {
        "command": "python -m benchmarks.integrations", "rounds": 3, "revision": "abc", "versions": {"torch": "1"},
        "machine": {"processor": "P", "cores": 2, "load_before": [5.0, 5.0, 5.0]},
        "networks": {"small": {"shown": "Two", "steps": 4, "milliseconds": [7.0, 8.0, 9.0], "rows": rows}},
    }  # fmt: skip
    lines = overhead(content).splitlines()
    assert lines[0] == "**Two**, a step of 8 ms in the plain loop by hand"
    assert "| plain loop | 0.40 (0.00 to 1.00) | 32 (0 to 80) | 1.00 (1.00 to 1.00) | yes |" in lines
    assert "| Lightning | 2.00 (0.00 to 5.00) | 160 (0 to 400) | 1.20 (1.10 to 1.30) | **no** |" in lines
    assert "busy with other work" in lines[-1]
