"""The cells of a grid: every run with its complete config.

For each seed one float cell is trained first. Every other cell of the seed starts from its weights, so methods differ
in nothing but what their row says.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nipq.compare.grid import FLOAT, Grid, Tree, unknown
from nipq.errors import ConfigError
from nipq.train.config import METHODS, BudgetConfig, check_config, merged

#: What makes a float cell of the shared settings, under the grid's own ``float`` overrides: no budget, no teacher, no
#: training of bits. It is rounded to 8 bits at its end, which shows that the model can be quantized at all.
FLOAT_CELL: Tree = {
    "budget": None,
    "teacher": None,
    "quantization": {"weight_bits": 8, "activation_bits": 8},
    "stages": {"search": {"epochs": 0}, "finetune": {"epochs": 0}},
}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        row: Label of its method, ``float`` for a float cell.
        budget: Label of its budget, ``None`` for a float cell.
        seed: Its seed.
        config: All fields of its config that differ from the defaults. Weights of the float cell are named relative to
            the comparison's folder.
    """

    row: str
    budget: str | None
    seed: int
    config: Tree

    @property
    def name(self) -> str:
        """Name of its files."""
        return cell_name(self.row, self.budget, self.seed)

    @property
    def is_float(self) -> bool:
        """Whether it trains the float network of its seed."""
        return self.budget is None

    @property
    def start(self) -> str:
        """Name of the float cell whose weights it starts from; a float cell's own name."""
        return cell_name(FLOAT, None, self.seed)


def expand(grid: Grid, presets: Mapping[str, Tree] = METHODS) -> list[Cell]:
    """All cells, seed by seed, so that an interrupted grid is a table with fewer seeds.

    Args:
        grid: The grid.
        presets: Config fields by word of a method.

    Returns:
        For each seed its float cell, then each budget's rows.

    Raises:
        ConfigError: Naming the row and the field of everything that is wrong, before anything trains.
    """
    _check_sections(grid, presets)
    cells = list(_cells(grid, presets))
    faults: dict[str, None] = {}  # a fault in many cells is told once
    shared: set[str] = set()
    for cell in cells:
        try:
            check_config(cell.config)
        except ConfigError as error:
            lines = str(error.__cause__ or error).splitlines()
            if cell.is_float:
                shared.update(lines)
            where = "base and float" if cell.is_float else f"row {cell.row!r}"
            faults |= dict.fromkeys(f"{where}: {line}" for line in lines if cell.is_float or line not in shared)
    names = Counter(cell.name for cell in cells)
    faults |= dict.fromkeys(
        f"two cells would be called {name!r}; use labels that differ in letters or digits"
        for name, count in names.items()
        if count > 1
    )
    if faults:
        raise ConfigError("\n".join(faults))
    return cells


def _check_sections(grid: Grid, presets: Mapping[str, Tree]) -> None:
    faults = []
    for label, row in grid.methods.items():
        if "method" not in row:
            word = label if label in presets else next(iter(presets))
            faults.append(f"row {label!r}: method: expected one, found none; write method: {word}")
        elif row["method"] not in presets:
            faults.append(f"row {label!r}: method: {unknown(str(row['method']), 'method', presets)}")
    for label, section in grid.budgets.items():
        try:
            if section is not None:
                BudgetConfig.model_validate(section)
        except ConfigError as error:
            faults += [f"budgets, {label!r}: {line}" for line in str(error).splitlines()]
    if faults:
        raise ConfigError("\n".join(faults))


def _cells(grid: Grid, presets: Mapping[str, Tree]) -> Iterator[Cell]:
    shared = copy.deepcopy(grid.base)
    float_stage = (shared.get("stages") or {}).pop("float", {})
    for seed in grid.seeds:
        own = {"seed": seed}
        yield Cell(FLOAT, None, seed, merged(shared, {"stages": {"float": float_stage}}, FLOAT_CELL, grid.float, own))
        for budget, section in grid.budgets.items():
            for label, row in grid.methods.items():
                if budget in map(str, row.get("budgets", grid.budgets)):
                    fields = {key: value for key, value in row.items() if key != "budgets"}
                    config = merged(shared, presets[row["method"]], fields, own)
                    config["budget"] = copy.deepcopy(section)
                    yield Cell(label, budget, seed, _started(config, f"runs/{cell_name(FLOAT, None, seed)}/float.pt"))


def _started(config: Tree, weights: str) -> Tree:
    """The config with the float cell's weights in the model, and in a teacher that is the same network."""
    model, teacher = config.get("model"), config.get("teacher")
    if not isinstance(model, dict):
        return config
    network = {key: model[key] for key in ("factory", "kwargs") if key in model}
    config = {**config, "model": {**model, "weights": weights}}
    if isinstance(teacher, dict):
        teacher = teacher if "factory" in teacher else {**network, **teacher}
        same = all(teacher.get(key) == network.get(key) for key in ("factory", "kwargs"))
        config["teacher"] = {"weights": weights, **teacher} if same else teacher
    return config


def cell_name(row: str, budget: str | None, seed: int) -> str:
    """Name of a cell's files.

    Example:
        >>> cell_name("LSQ+, dampened", "3/3", 0), cell_name("float", None, 0)
        ('LSQ+-dampened-3-3-seed0', 'float-seed0')
    """
    parts = [row, *([] if budget is None else [budget]), f"seed{seed}"]
    return "-".join(re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts)
