"""Results of ``nipq.verify``: one check for each level (E0 to E3) of each artifact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nipq.tables import Column, FittedTable, plain_text


@dataclass(frozen=True)
class Check:
    """One claim about a deployed model, and whether it holds.

    Attributes:
        name: level of the check: ``"E0 static"``, ``"E1 layers"``, ``"E2 noise"`` or ``"E3 exact"``.
        claim: what was compared.
        passed: whether the claim holds.
        numbers: what was measured, by name.
        first_difference: the first difference in the order of execution, with the layer's full name; None if none.
        artifact: the file or model that was checked; empty for a deployed module that is the only artifact.
    """

    name: str
    claim: str
    passed: bool
    numbers: dict[str, Any]
    first_difference: str | None
    artifact: str = ""


@dataclass(frozen=True)
class VerifyResult:
    """All checks of a comparison; true when every one passed. Prints as a table.

    Attributes:
        checks: from E0 to E3, artifact by artifact.
    """

    checks: tuple[Check, ...]

    @property
    def first_difference(self) -> str | None:
        """The first difference of the first check that failed, with artifact and layer name; None if all passed."""
        failed = next((check for check in self.checks if not check.passed), None)
        if failed is None or failed.first_difference is None or not failed.artifact:
            return None if failed is None else failed.first_difference
        return f"{failed.artifact}: {failed.first_difference}"

    def __bool__(self) -> bool:
        """Return whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"passed": bool(self), "checks": [asdict(check) for check in self.checks]}

    def table(self) -> FittedTable:
        """The table that ``print`` shows, for a rich console of any width."""
        heading = "deployed model equals trained model" if self else "deployed model DIFFERS from trained model"
        columns = Column("check", least=9), Column("", least=5), Column("claim", least=20), Column("found", least=20)
        table = FittedTable(*columns, title=heading)
        for number, check in enumerate(self.checks):
            if check.artifact and (number == 0 or self.checks[number - 1].artifact != check.artifact):
                table.add_section()
                table.add_row("", "", check.artifact, "", style="bold")
            found = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in check.numbers.items())
            if check.first_difference is not None:
                found = f"{check.first_difference}\n{found}"
            table.add_row(check.name, "ok" if check.passed else "FAILS", check.claim, found)
        return table

    def __str__(self) -> str:
        """The table as plain text, 80 columns at most."""
        return plain_text(self.table())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
