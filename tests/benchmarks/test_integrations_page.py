from __future__ import annotations

from typing import Any

from benchmarks.integrations_page import overhead


def rows(extra: float) -> dict[str, Any]:
    row = {"ratio": [0.99, 1.01, 1.05], "trainer": [1.1, 1.2, 1.3]}
    return {
        "plain loop": row | {"extra_microseconds": [0.0, extra, 2 * extra]},
        "Lightning": row | {"extra_microseconds": [0.0, 4 * extra, 8 * extra]},
    }


def test_the_table_shows_shares_and_who_missed_the_goal() -> None:
    networks = {
        "least": {"shown": "little", "steps": 4, "milliseconds": [1.0, 1.5, 2.0], "rows": rows(40.0)},
        "small": {"shown": "more", "steps": 4, "milliseconds": [7.0, 8.0, 9.0], "rows": rows(0.0)},
    }
    content = {
        "command": "python -m benchmarks.integrations", "rounds": 3, "revision": "abc", "versions": {"torch": "1"},
        "machine": {"processor": "P", "cores": 2, "load_before": [5.0, 5.0, 5.0]}, "networks": networks,
    }  # fmt: skip
    lines = overhead(content).splitlines()
    assert "of a step of 8 ms" in lines[0]
    assert "| plain loop | 40 (0 to 80) | 0.5 % | yes | 1.0 (-1.0 to 5.0) | 1.20 (1.10 to 1.30) |" in lines
    assert "| Lightning | 160 (0 to 320) | 2.0 % | not settled | 1.0 (-1.0 to 5.0) | 1.20 (1.10 to 1.30) |" in lines
    networks["least"]["rows"]["Lightning"]["extra_microseconds"] = [160.0, 161.0, 162.0]
    assert "| 2.0 % | **no** |" in overhead(content)
    assert "on little, where a step takes 1.5 ms" in lines[-1]
    assert "busy with other work" in lines[-1]
