"""Curves of the measured cells by method, and losses where the reference has lost so much."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.shown import Record, lines_of

Curve = dict[float, float]

RESULTS = Path(__file__).parent / "results.jsonl"


def read_records() -> list[Record]:
    """Every measured cell."""
    return [record for record in lines_of(RESULTS) if "clean" in record]


def budgets(records: Sequence[Record]) -> list[str]:
    """Labels of the budgets, in order of their names."""
    return sorted({record["cell"]["budget"] for record in records} - {None})


def rows_of(records: Sequence[Record], budget: str) -> dict[str, list[Record]]:
    """Cells of one budget by method, float first, seeds in order."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["cell"]["budget"] is not None, r["cell"]["row"], r["cell"]["seed"])):
        if record["cell"]["budget"] in (None, budget):
            found.setdefault(record["cell"]["row"], []).append(record)
    return found


def metric_of(records: Sequence[Record]) -> str:
    """Name and unit of the metric."""
    metric = records[0]["metric"]
    return f"{metric['name']} [{metric['unit']}]" if metric["unit"] else str(metric["name"])


def _score(record: Record, point: dict[str, Any]) -> float:
    return float(point["scores"][record["metric"]["name"]])


def _means(pairs: Sequence[tuple[float, float]]) -> Curve:
    by_strength: dict[float, list[float]] = {}
    for strength, score in pairs:
        by_strength.setdefault(strength, []).append(score)
    return {strength: statistics.fmean(by_strength[strength]) for strength in sorted(by_strength)}


def perturbation_curve(kind: str) -> Callable[[Record], Curve]:
    """Metric by strength of one kind of noise, mean over the noise's seeds; 0 is the clean network."""

    def curve(record: Record) -> Curve:
        points = record.get("perturbation", {"points": []})["points"]
        chosen = [point for point in points if point["setting"]["kind"] in ("none", kind)]
        return _means([(point["setting"]["strength"], _score(record, point)) for point in chosen])

    return curve


def corruption_curve(name: str | None = None) -> Callable[[Record], Curve]:
    """Metric by severity of one corruption, or the mean over all; 0 is the clean images."""

    def curve(record: Record) -> Curve:
        points = record.get("corruption", {"points": []})["points"]
        chosen = [p for p in points if name is None or p["setting"]["corruption"] in ("none", name)]
        return _means([(point["setting"]["severity"], _score(record, point)) for point in chosen])

    return curve


def lowered_curve(boundaries: str) -> Callable[[Record], Curve]:
    """Metric by number of bits taken."""

    def curve(record: Record) -> Curve:
        points = record.get("lowered", {"points": []})["points"]
        chosen = [p for p in points if p["setting"]["by"] == 0 or p["setting"]["boundaries"] == boundaries]
        return {p["setting"]["by"]: _score(record, p) for p in chosen}

    return curve


def landscape_curve(record: Record) -> Curve:
    """Loss by step along a direction, mean over the directions."""
    lines = record.get("landscape_1d", [])
    return _means([(p["setting"]["x"], p["scores"]["loss"]) for line in lines for p in line["points"]])


def lost(record: Record, curve: Curve) -> Curve:
    """Points of the metric lost against the clean network; a gain is negative."""
    sign = 1 if record["metric"]["higher_is_better"] else -1
    clean = curve[0]
    return {strength: sign * (clean - value) for strength, value in curve.items()}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over cells at the strengths that all have."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return {strength: statistics.fmean(curve[strength] for curve in curves) for strength in shared}


def value_at(curve: Curve, strength: float) -> float:
    """Linear interpolation."""
    places = sorted(curve)
    for low, high in pairwise(places):
        if low <= strength <= high:
            share = (strength - low) / (high - low)
            return (1 - share) * curve[low] + share * curve[high]
    raise ValueError(f"expected a strength from {places[0]} to {places[-1]}, found {strength}")


def first_crossing(curve: Curve, level: float) -> float | None:
    """The least strength at which the interpolated curve reaches a level, or None if it never does."""
    places = sorted(curve)
    for low, high in pairwise(places):
        if curve[low] < level <= curve[high]:
            return low + (high - low) * (level - curve[low]) / (curve[high] - curve[low])
    return None


def drops(
    rows: dict[str, list[Record]], curve_of: Callable[[Record], Curve], reference: str, points: float
) -> dict[str, Any]:
    """At the strength where the reference, on average over seeds, has lost so many points: what each row has lost.

    Args:
        rows: cells by method.
        curve_of: metric by strength of one cell.
        reference: the row that sets the strength.
        points: how much it has lost there, points of the metric.

    Returns:
        ``strength`` (None if the reference never loses so much) and, by row, the losses of its seeds.
    """
    losses = {
        name: [lost(record, curve) for record in cells if (curve := curve_of(record))] for name, cells in rows.items()
    }
    strength = first_crossing(mean_curve(losses[reference]), points) if losses.get(reference) else None
    if strength is None:
        return {"strength": None, "lost": {}}
    found = {name: [value_at(curve, strength) for curve in curves] for name, curves in losses.items() if curves}
    return {"strength": strength, "lost": found}
