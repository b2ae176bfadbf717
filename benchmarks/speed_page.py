"""Tables of speed and memory, from the committed files; for ``experiments/write_results.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import record
from benchmarks.goals import goals_table
from experiments.shown import picture, table

Record = dict[str, Any]

LAYOUTS = {"contiguous": "contiguous", "channels_last": "channels last"}


def span(quartiles: list[float] | None, digits: int = 2) -> str:
    """Median with the quartiles behind it."""
    if quartiles is None:
        return ""
    low, median, high = (f"{value:,.{digits}f}" for value in quartiles)
    return f"{median} ({low} to {high})"


def number(quartiles: list[float]) -> str:
    """The median alone, with three digits that count."""
    return f"{quartiles[1]:,.0f}" if quartiles[1] >= 100 else f"{quartiles[1]:.3g}"


def origin(content: Record) -> str:
    """Origin of a results file, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    machine = content["machine"]
    load = machine["load_before"]
    busy = "" if load is None else f" (load average before: {load[0]:g})"
    if load is not None and load[0] > 1:
        busy += ", **busy with other work: read the ratios with caution**"
    return (
        f"`{content['command']}`, {content['rounds']} rounds, revision {content['revision']}; "
        f"{machine['processor']}, {machine['cores']} cores{busy}; {versions}.\n"
    )


def training_step(content: Record) -> str:
    """Time and memory of a training step, one table for each network."""
    parts = list(map(_network, content["networks"].values()))
    parts.append(
        "Ratios to the float step in the memory format in which that is faster: median (quartiles) over rounds. One "
        "thread: CPU time; two threads: wall time. Saved: bytes that autograd keeps for backward, parameters and "
        "buffers not counted. Peak: growth of the process within a step. Both with one thread. " + origin(content)
    )
    parts.append(picture("speed_training_step", "time of a training step") + "\n")
    return "\n".join(parts)


def _network(network: Record) -> str:
    threads, reference = network["threads"], network["reference"]
    rows = next(iter(threads.values()))
    lines = []
    for variant, layouts in rows.items():
        for layout in layouts:
            times = [span(found[variant][layout]["ratio"]) for found in threads.values()]
            kept = network["memory"][f"{variant} | {layout}"]
            base = network["memory"][f"float | {reference}"]
            shown = variant if layout == reference else f"{variant}, {LAYOUTS[layout]}"
            lines.append([shown, *times, *(_of(kept[what], base[what]) for what in ("saved", "peak"))])
    steps = ", ".join(
        f"{number(found['float'][reference]['milliseconds'])} ms on {_threads(count)}"
        for count, found in threads.items()
    )
    shape = " x ".join(str(length) for length in [network["batch"], *network["shape"]])
    saved = _bytes(network["memory"][f"float | {reference}"]["saved"])
    notes = "".join(f" {note}" for note in network["notes"])
    head = f"**{network['shown']}**, batch of {shape}, {LAYOUTS[reference]}; float: {steps}, {saved} saved.{notes}\n\n"
    return head + table(["", *(_threads(count) for count in threads), "saved", "peak"], lines)


def _threads(count: str) -> str:
    return f"{count} thread" if count == "1" else f"{count} threads"


def _of(value: int | None, base: int | None) -> str:
    return "" if value is None or not base else f"{value / base:.2f}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def compiled(content: Record) -> str:
    """Whole models through torch.compile."""
    rows = [
        [
            f"{network['shown']}, {LAYOUTS[network['layout']]}",
            *(span(network["rows"][name]["ratio"]) for name in ("float, eager", "nipq")),
            f"{network['saved']['nipq'] / network['saved']['float']:.2f}",
            *(f"{network['compile_seconds'][name]:.0f} s" for name in ("float", "nipq")),
        ]
        for network in content["networks"].values()
    ]
    headings = ["", "float, not compiled", "nipq, compiled", "saved by nipq", "float compiles in", "nipq compiles in"]
    return (
        table(headings, rows) + "\n"
        "Ratios to the float step through `torch.compile(fullgraph=True)`, one thread, CPU time. Compile times are of "
        "the first step, forward and backward. " + origin(content)
    )


def elements(content: Record) -> str:
    """Element kernels, and the fixed cost of a call."""
    parts = []
    for size in sorted({case["elements"] for case in content["cases"]}, reverse=True):
        cases = [case for case in content["cases"] if case["elements"] == size]
        parts.append(f"**{size:,} elements**\n\n{_element_table(cases)}")
    rows = [[name, span(found, 0)] for name, found in content["fixed"].items()]
    parts.append(
        "Nanoseconds an element, forward + backward, and their ratio to a copy + an add. Kept: bytes an element that "
        "backward needs besides the result. " + origin(content)
    )
    parts.append(table(["16 elements", "microseconds a call, forward + backward"], rows))
    parts.append(picture("speed_elements", "nanoseconds an element") + "\n")
    return "\n".join(parts)


def _element_table(cases: list[Record]) -> str:
    headings = [f"{case['dtype']}, {_threads(str(case['threads']))}" for case in cases]
    limit = ["copy + add", *(f"{number(case['limit']['copy'])} + {number(case['limit']['add'])}" for case in cases), ""]
    names = list(dict.fromkeys(name for case in cases for name in case["rows"]))
    rows = [limit]
    for name in names:
        cells = [_element_cell(case["rows"].get(name)) for case in cases]
        kept = next(case["rows"][name]["kept"] for case in cases if name in case["rows"])
        rows.append([name, *cells, f"{kept:g}"])
    return table(["", *headings, "kept, float32"], rows)


def _element_cell(row: Record | None) -> str:
    if row is None:
        return ""
    return f"{number(row['forward'])} + {number(row['backward'])}: {row['ratio'][1]:.3g}x"


def many_quantizers(content: Record) -> str:
    """Table of the cost of each further quantizer."""
    costs = content["microseconds"]
    counts = list(next(iter(costs.values())))
    rows = [[part, *(number(found[count]) for count in counts)] for part, found in costs.items()]
    return (
        table(["microseconds for each of", *(f"{int(count):,} quantizers" for count in counts)], rows)
        + "\nA chain of linear layers of 8 x 8, two quantizers each; medians, one thread. " + origin(content)
    )  # fmt: skip


def _goals() -> str:
    names = ("training_step", "compiled", "elements")
    return goals_table({name: content for name in names if (content := record.read(name)) is not None})


def _block(name: str, show: Callable[[Record], str]) -> Callable[[], str]:
    def text() -> str:
        content = record.read(name)
        return "Nothing is measured yet.\n" if content is None else show(content)

    return text


#: Blocks of the pages by name.
BLOCKS: dict[str, Callable[[], str]] = {
    "speed-goals": _goals,
    "speed-step": _block("training_step", training_step),
    "speed-compiled": _block("compiled", compiled),
    "speed-elements": _block("elements", elements),
    "speed-quantizers": _block("many_quantizers", many_quantizers),
}
