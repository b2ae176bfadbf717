"""``nipq show``: the state of a run folder, finished or not, and the table of its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nipq.cli.output import JsonFlag, answer
from nipq.cli.output import show as show_parts
from nipq.cli.reporting import reporting
from nipq.tables import Column, FittedTable
from nipq.train.run_folder import RunFolder, reading

#: Names of the states of a model.
NAMES = {
    "float": "float",
    "frozen": "frozen",
    "bn": "batch norms",
    "finetuned": "fine-tuned",
}


def results_table(results: Mapping[str, Any], title: str) -> FittedTable:
    """Build a table of scores, bits, bytes and the outcome of verify.

    Args:
        results: as in ``results.json``.
        title: of the table.

    Returns:
        A table for a rich console of any width.
    """
    table = FittedTable(Column("", least=30), Column("", least=30), title=title)
    metric = results.get("metric", {"name": "accuracy", "unit": "%"})  # older files know of no other
    for name, scores in results["states"].items():
        held_out = f" (validation {_score(scores['validation'], metric)})" if "validation" in scores else ""
        table.add_row(f"test {metric['name']}, {NAMES.get(name, name)}", f"{_score(scores['test'], metric)}{held_out}")
    table.add_row("average bits, weights / activations", _pair(results["average_bits"]))
    for limit in results["limits"]:
        table.add_row(f"limit: {limit['name']}", f"{limit['rounded']:,.6g} of {limit['target']:,.6g} {limit['unit']}")
    packed, full = results["bytes"]["file"], results["bytes"]["float32"]
    table.add_row("bytes on disk", f"{packed:,}, {100 * packed / full:.1f} % of float32 ({full:,})")
    table.add_row("deployed equals trained", "yes, at every level" if results["verified"] else "NO, see verify.json")
    table.add_row("training time", f"{results['seconds']:.1f} s, {results['steps']:,} steps")
    return table


def _score(scores: Mapping[str, float], metric: Mapping[str, Any]) -> str:
    return f"{scores[metric['name']]:.2f} {metric['unit']}".rstrip()


def _pair(bits: Mapping[str, float | None]) -> str:
    return " / ".join("float" if bits[key] is None else f"{bits[key]:.4f}" for key in ("weights", "activations"))


def show(folder: Annotated[Path, typer.Argument(help="Run folder.")], as_json: JsonFlag = False) -> None:
    """Show a run: how far it is, its accuracies, its layers."""
    with reporting(as_json):
        place = RunFolder(folder)
        config, rows = place.read_config(), place.rows()
        results, layers = place.read(place.results, dict), place.read(place.layers_json, list)
        if as_json:
            progress = {"finished": results is not None, "last_epoch": rows[-1] if rows else None}
            answer({"run": str(folder), **progress, "results": results, "layers": layers})
            return
        if results is None:
            done = f"{rows[-1]['stage']} epoch {rows[-1]['epoch']}" if rows else "nothing yet"
            show_parts(
                f"{folder}: {config.model.factory}, not finished; last complete: {done}. Continue it with --resume."
            )
            return
        with reading(place.results):
            scores = results_table(results, title=f"{folder.name}: {config.model.factory}")
        with reading(place.layers_json):
            table = layers_table(layers)
        show_parts(scores, table)


def layers_table(layers: list[dict[str, Any]]) -> FittedTable:
    """Build the table of a run's layers.

    Args:
        layers: as in ``layers.json``.
    """
    table = FittedTable(
        Column("layer", least=24),
        Column("kind", rank=2, least=12),
        Column("W bits"),
        Column("A bits"),
        Column("W range", rank=5),
        Column("A range", rank=4),
        Column("weights", rank=1),
        Column("MMAC", rank=3),
        title="Layers",
        borders=False,
    )
    for row in layers:
        table.add_row(
            row["name"], row["kind"], str(row["weight_bits"]),
            "float" if row["activation_bits"] is None else str(row["activation_bits"]),
            f"{row['weight_alpha']:.3g}", "-" if row["activation_alpha"] is None else f"{row['activation_alpha']:.3g}",
            f"{row['weight_count']:,}", f"{row['macs'] / 1e6:.3f}",
        )  # fmt: skip
    return table
