"""What a comparison of trained and deployed model found."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Rung:
    """One claim about the deployed model, and whether it holds.

    Attributes:
        name: ``"E0 static"``, ``"E1 layers"``, ``"E2 noise"`` or ``"E3 exact"``.
        claim: what was compared.
        passed: whether the claim holds.
        numbers: what was measured, by name.
        first_difference: the first difference in the order of execution, with the layer's full name; None if none.
        artifact: what it is about, when there are several artifacts or it is a file.
    """

    name: str
    claim: str
    passed: bool
    numbers: dict[str, Any]
    first_difference: str | None
    artifact: str = ""


@dataclass(frozen=True)
class VerifyResult:
    """All rungs; true when every one holds, and prints itself.

    Attributes:
        rungs: from E0 to E3, artifact by artifact.
    """

    rungs: tuple[Rung, ...]

    @property
    def first_difference(self) -> str | None:
        """The first difference of the lowest rung that fails, with the layer's full name; None if all hold."""
        failed = (rung for rung in self.rungs if not rung.passed)
        return next((_about(rung.artifact, rung.first_difference) for rung in failed), None)

    def __bool__(self) -> bool:
        """Whether every rung holds."""
        return all(rung.passed for rung in self.rungs)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"passed": bool(self), "rungs": [asdict(rung) for rung in self.rungs]}

    def table(self) -> Table:
        """The table that ``print`` shows, for a rich console."""
        heading = "deployed model equals trained model" if self else "deployed model DIFFERS from trained model"
        table = Table(title=heading, title_justify="left")
        for column in ("rung", "", "claim", "found"):
            table.add_column(column, overflow="fold")
        for number, rung in enumerate(self.rungs):
            if rung.artifact and (number == 0 or self.rungs[number - 1].artifact != rung.artifact):
                table.add_section()
                table.add_row("", "", f"[bold]{escape(rung.artifact)}", "")
            found = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in rung.numbers.items())
            if rung.first_difference is not None:
                found = f"{rung.first_difference}\n{found}"
            table.add_row(rung.name, "ok" if rung.passed else "FAILS", rung.claim, escape(found))
        return table

    def __str__(self) -> str:
        """The table as plain text, 140 columns at most."""
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self.table())
        return text.getvalue()


def _about(artifact: str, difference: str | None) -> str | None:
    return f"{artifact}: {difference}" if artifact and difference is not None else difference


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
