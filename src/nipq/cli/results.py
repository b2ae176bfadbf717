"""Results of a run as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

#: Names of the states of a model.
NAMES = {
    "float": "float",
    "frozen": "frozen",
    "bn": "batch norms",
    "finetuned": "fine-tuned",
}


def results_table(results: Mapping[str, Any], title: str) -> Table:
    """Build a table of scores, bits, bytes and the outcome of verify.

    Args:
        results: as in ``results.json``.
        title: of the table.

    Returns:
        A table for a rich console.
    """
    table = Table(title=title, title_justify="left", show_header=False)
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
