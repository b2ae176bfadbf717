"""The grid of a comparison as its YAML file says it: methods x budgets x seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from nipq.config import Settings
from nipq.errors import ConfigError

Tree = dict[str, Any]

FLOAT = "float"


class Grid(Settings):
    """A comparison as its YAML file says it.

    Attributes:
        name: Title of the table.
        base: Fields of :class:`~nipq.train.config.TrainConfig` that all cells share. ``stages.float`` belongs to the
            float cells; a ``teacher`` without a factory is the seed's float network.
        float: What the float cells have of their own.
        budgets: Section ``budget`` of a cell by label; ``null`` for methods that need none.
        methods: Rows of the table by label: the word of a ``method``, a ``budgets`` list where the row is not for all
            of them, and any fields of the config. A plain list of words is short for rows of these names.
        seeds: One column of cells each.
        baseline: The row that is set against its rivals; the first one if left out.
        rivals: The rows that it is set against; all others if left out.

    Raises:
        ConfigError: If a field is wrong, or a label names nothing or two things.
    """

    name: str = Field(min_length=1)
    base: Tree
    float: Tree = Field(default_factory=dict)
    budgets: dict[str, Tree | None] = Field(min_length=1)
    methods: dict[str, Tree] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    baseline: str = ""
    rivals: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:  # noqa: ANN401 - what the YAML holds
        """Rows as mappings, budgets by text labels, the first row as baseline."""
        if not isinstance(value, Mapping):
            return value
        tree = dict(value)
        methods = tree.get("methods")
        if isinstance(methods, list):
            methods = {str(word): None for word in methods}
        if isinstance(methods, Mapping):
            rows = {str(label): row for label, row in methods.items()}
            tree["methods"] = {
                label: {"method": label} if row is None else {"method": row} if isinstance(row, str) else row
                for label, row in rows.items()
            }
            tree.setdefault("baseline", next(iter(rows), ""))
        if isinstance(tree.get("budgets"), Mapping):
            tree["budgets"] = {str(label): section for label, section in tree["budgets"].items()}
        return tree

    @model_validator(mode="after")
    def _check(self) -> Grid:
        rows, faults = list(self.methods), []
        if FLOAT in rows:
            faults.append(f"expected no row of the name {FLOAT!r}, which is the float cells'; name it otherwise")
        for where, labels in (("baseline", [self.baseline]), ("rivals", self.rivals or ())):
            faults += [f"{where}: {unknown(label, 'row', rows)}" for label in labels if label not in rows]
        faults += _forbidden("base", self.base, ("seed", "budget", "method"))
        faults += _forbidden("float", self.float, ("seed", "budget", "method"))
        for label, row in self.methods.items():
            faults += _forbidden(f"row {label!r}", row, ("seed", "budget", "model"))
            only = row.get("budgets", [])
            if not isinstance(only, list):
                faults.append(f"row {label!r}: expected a list of budgets, found {only!r}; write budgets: [LABEL]")
                continue
            faults += [
                f"row {label!r}: {unknown(str(budget), 'budget', self.budgets)}"
                for budget in only
                if str(budget) not in self.budgets
            ]
        repeated = [seed for seed, count in Counter(self.seeds).items() if count > 1]
        if repeated or min(self.seeds) < 0:
            faults.append(f"seeds: expected different numbers from 0, found {list(self.seeds)}; correct them")
        if faults:
            raise ValueError("\n".join(faults))
        return self


def load_grid(path: str | Path) -> Grid:
    """Read a grid file.

    Args:
        path: The YAML file.

    Returns:
        The grid; what its rows mean is checked by :func:`~nipq.compare.cells.expand`.

    Raises:
        ConfigError: If the file is missing, is not YAML, or a field is wrong.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected a YAML grid file, found {str(path)!r}: {error}; see docs/compare.md") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"expected a mapping in {path}, found {type(tree).__name__}; see docs/compare.md")
    try:
        return Grid.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a valid grid:\n{error}") from error


def _forbidden(where: str, tree: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    said = {
        "seed": "seeds stand in the grid's seeds",
        "budget": "budgets stand in the grid's budgets",
        "method": "methods stand in the grid's rows",
        "model": "all rows start from the same float network",
    }
    return [f"{where}: expected no {key!r}, found {tree[key]!r}; {said[key]}" for key in keys if key in tree]


def unknown(word: str, kind: str, known: Iterable[str]) -> str:
    """Message about a word that is not among the known ones."""
    close = get_close_matches(word, known := list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "correct it."
    return f"expected a known {kind} ({', '.join(known)}), found {word!r}; {hint}"
