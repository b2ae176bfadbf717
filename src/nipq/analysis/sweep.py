"""What a series of measurements gives back: settings with their scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        setting: what was done to the model or its inputs, by name; strengths, seeds, kinds.
        scores: how the model did, by name.
    """

    setting: dict[str, Any]
    scores: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """A series of measurements of one model.

    Attributes:
        measured: which property, such as ``"perturbation"``.
        points: in the order in which they were taken.
    """

    measured: str
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)
