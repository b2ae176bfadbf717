"""``nipq show``: what is in a run folder, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nipq.cli.output import answer
from nipq.cli.results import results_table
from nipq.train.run_folder import RunFolder


def show_run(folder: Path, *, as_json: bool) -> None:
    """Print a run's state.

    Args:
        folder: Run folder.
        as_json: Print JSON.

    Raises:
        ConfigError: If the folder holds no run.
    """
    place = RunFolder(folder)
    config = place.read_config()
    rows = place.rows()
    results = _read(place.results)
    layers = _read(place.layers_json)
    if as_json:
        progress = {"finished": results is not None, "last_epoch": rows[-1] if rows else None}
        answer({"run": str(folder), **progress, "results": results, "layers": layers})
        return
    console = Console()
    if results is None:
        done = f"{rows[-1]['stage']} epoch {rows[-1]['epoch']}" if rows else "nothing yet"
        console.print(
            f"{folder}: {config.model.factory}, not finished; last complete: {done}. Continue it with --resume."
        )
        return
    console.print(results_table(results, title=f"{folder}: {config.model.factory}"))
    console.print(_layer_table(layers))


def _read(path: Path) -> Any:  # noqa: ANN401 - JSON
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    table = Table(title="layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("kind", "W bits", "A bits", "W alpha", "A alpha", "weights", "MMAC"):
        table.add_column(heading, justify="right")
    for row in layers:
        table.add_row(
            row["name"], row["kind"], str(row["weight_bits"]),
            "float" if row["activation_bits"] is None else str(row["activation_bits"]),
            f"{row['weight_alpha']:.3g}", "-" if row["activation_alpha"] is None else f"{row['activation_alpha']:.3g}",
            f"{row['weight_count']:,}", f"{row['macs'] / 1e6:.3f}",
        )  # fmt: skip
    return table
