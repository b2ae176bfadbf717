from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import experiments.tasks.networks
from nipq.train.compare import expand, load_grid
from nipq.train.factory import find_factory

TASKS = Path(experiments.tasks.networks.__file__).parent
GRIDS = sorted(path for path in TASKS.glob("*.yaml") if "candidates" not in path.stem)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_a_grid_is_a_valid_run(path: Path) -> None:
    grid = load_grid(path)
    cells = expand(grid)
    rows = sum(len(method.get("budgets", grid.budgets)) for method in grid.methods.values())
    assert len(cells) == len(grid.seeds) * (1 + rows)
    assert len(grid.seeds) >= 3
    for section in (grid.base["data"]["factory"], grid.base["model"]["factory"], grid.base.get("task", "resnet18")):
        assert callable(find_factory(section))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_s_first_lines_run_it(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"nipq compare experiments/tasks/{path.name} " in line for line in head)


@pytest.mark.parametrize("name", ["which_photo_mobilenet_v3", "which_photo_resnet18", "super_resolution"])
def test_the_network_of_a_grid_is_built_from_its_section(name: str) -> None:
    model = load_grid(TASKS / f"{name}.yaml").base["model"]
    assert isinstance(find_factory(model["factory"])(**model.get("kwargs", {})), nn.Module)


def test_the_two_networks_of_a_task_share_all_but_their_lengths() -> None:
    first, second = (load_grid(TASKS / f"which_photo_{name}.yaml") for name in ("mobilenet_v3", "resnet18"))
    assert (first.budgets, first.seeds, first.float) == (second.budgets, second.seeds, second.float)
    words = [{label: row["method"] for label, row in grid.methods.items()} for grid in (first, second)]
    assert words[1].items() <= words[0].items()  # the smaller network has rows besides
    total = [first.base["stages"][stage]["epochs"] for stage in ("search", "finetune")]
    for row in first.methods.values():  # each method cuts the same epochs where it likes
        stages = row.get("stages", first.base["stages"])
        assert sum(stages[stage]["epochs"] for stage in ("search", "finetune")) == sum(total)
    assert first.base["data"] == second.base["data"]
    assert first.base["optimizer"] == second.base["optimizer"]
