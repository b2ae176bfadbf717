"""What is counted for docs/internals/scale.md, on chains of a few layers, and the page made from it."""

from __future__ import annotations

import pytest

from benchmarks import record, scale_page
from benchmarks.scale import line
from benchmarks.scale_page import Decoder

POINT = {
    "memory": {"parameters": 156, "gradients": 156, "adam": 312, "buffers": 8, "python": 2048, "snap": 4096},
    "saved": {"float": 1024, "quantized": 2048, "quantized, blocks of ten recomputed": 1536},
    "microseconds": {"penalty + backward": [1.0, 700.0, 800.0]},
    "messages": {
        "DDP, float": {"bytes": 1, "messages": 1}, "DDP": {"bytes": 2, "messages": 1},
        "FSDP, quantizers": {"bytes": 156, "messages": 1}, "penalty and search.step": {"bytes": 0, "messages": 0},
        "freeze_bits_": {"bytes": 4000, "messages": 2},
    },
}  # fmt: skip


def test_a_line_is_found_again() -> None:
    found = line({"10": 25.0, "100": 205.0, "1000": 2005.0})
    assert found["fixed"] == pytest.approx(5)
    assert found["each"] == pytest.approx(2)
    assert found["largest relative error"] == 0


def test_the_decoder_has_the_published_size() -> None:
    assert Decoder().weights == 6_738_149_376
    assert Decoder().quantizers == 226 + 353


def test_the_page_shows_measurement_and_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "machine": {"processor": "CPU", "cores": 2, "load_before": [0.5, 0, 0]}, "versions": {"torch": "2"},
        "revision": "abc", "command": "python", "rounds": 3, "width": 16, "batch": 2, "measured": {"20": POINT},
        "lines": {"penalty + backward": {"fixed": 100.0, "each": 2.0, "largest relative error": 0.04}},
    }  # fmt: skip
    monkeypatch.setattr(record, "read", lambda name: content if name == "scale" else None)
    text = scale_page.BLOCKS["scale-measured"]() + scale_page.BLOCKS["scale-decoder"]()
    assert "| penalty + backward, us | 700 |" in text
    assert "| penalty + backward, on this CPU | 100 us + 2.00 us x Q | 1.3 ms |" in text
    assert "| said at the freeze by each rank, once | 200 B x Q | 113 KiB |" in text
    assert "| quantized weights kept for backward | 2 B x N (bf16) | 13.5 GB |" in text
    assert "no point is further off than 4%" in text
