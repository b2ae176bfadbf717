"""``nipq compare``: train the cells of a grid file, then write, draw and print their table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from nipq.cli.output import FAILURE, JsonFlag, answer, show
from nipq.cli.reporting import reporting
from nipq.errors import MissingDependencyError, require
from nipq.train.compare import CompareFolder, expand, load_grid, run_cells
from nipq.train.compare_plots import plot_comparison
from nipq.train.compare_table import compare, printed_parts, save_table


def run_compare(
    path: Path,
    folder: Path,
    *,
    data: Path | None,
    workers: int | None,
    table_only: bool,
    overwrite: bool,
    as_json: bool,
) -> bool:
    """Run the cells of a grid that are not done, then write, draw and print the table of those that are.

    Args:
        path: grid file.
        folder: the comparison's folder.
        data: folder of the data.
        workers: cells side by side.
        table_only: train nothing.
        overwrite: discard results of another config.
        as_json: print JSON; progress goes to standard error.

    Returns:
        Whether every cell of the grid that should have run has its result.

    Raises:
        MissingDependencyError: without pandas.
    """
    require("pandas", extra="report", purpose="the table of a comparison")  # before hours of training, not after
    grid = load_grid(path)
    cells = expand(grid)
    progress = Console(file=sys.stderr if as_json else sys.stdout, soft_wrap=True)
    failed: list[str] = []
    if not table_only:
        outcomes = run_cells(
            cells,
            folder,
            grid=grid.name,
            data=None if data is None else str(data.resolve()),
            workers=workers,
            overwrite=overwrite,
            say=lambda line: progress.print(escape(line), highlight=False),
        )
        failed = [outcome.name for outcome in outcomes if not outcome.ok]
        if len(failed) == len(cells):
            if as_json:
                answer({"folder": str(folder), "failed": failed, "table": None, "plots": []}, ok=False)
            return False
    place, comparison = CompareFolder(folder), compare(grid, cells, folder)
    save_table(comparison, place)
    try:
        pictures = plot_comparison(comparison, place.plots)
    except MissingDependencyError as error:
        pictures = []
        progress.print(f"[yellow]no plots: {escape(str(error))}")
    if as_json:
        shown = {"plots": [str(picture) for picture in pictures], "table": comparison.to_dict()}
        answer({"folder": str(folder), "failed": failed, **shown}, ok=not failed)
        return not failed
    show(*printed_parts(comparison), f"table and plots are in {folder}")
    if failed:
        show(f"{len(failed)} cells have no result: {', '.join(failed)}")
    return not failed


def compare_command(
    grid: Annotated[Path, typer.Argument(help="YAML grid of methods, budgets and seeds; see docs/guide/comparing.md.")],
    folder: Annotated[Path, typer.Option("--run", help="Folder of the comparison; what is done in it stays.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the data (overrides data.path).")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells side by side; one on each GPU, or one.")] = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Train nothing; table of what is done.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard cells whose settings changed.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train methods at equal budgets over several seeds, and put them side by side with intervals."""
    with reporting(as_json):
        ok = run_compare(
            grid, folder, data=data, workers=workers, table_only=table_only, overwrite=overwrite, as_json=as_json
        )
        if not ok:
            raise typer.Exit(FAILURE)
