"""One thing worth knowing about a model before it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that ``prepare_`` would refuse, leave float, or do in a way worth knowing.

    Attributes:
        name: full name of the module.
        severity: ``"error"`` (refused), ``"float"`` (stays float) or ``"note"``.
        reason: what was found.
        remedy: what to do about it, empty when there is nothing to do.
    """

    name: str
    severity: Literal["error", "float", "note"]
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line: severity, name, reason, remedy."""
        return f"{self.severity}: {self.name or 'the model'}: {self.reason}.{' ' + self.remedy if self.remedy else ''}"
