"""Tables about exported files: runtimes, sizes, verification, latency; for ``experiments/write_results.py``."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from experiments.export.records import RESULTS
from experiments.export.zoo import NETWORKS
from experiments.shown import Record, lines_of
from experiments.shown import table as table_of

NOTHING = "Nothing is measured yet.\n"
RUNGS = ("E0 static", "E1 layers", "E2 noise", "E3 exact")
#: Artifacts of the trained runs, as the pages call them.
ARTIFACTS = {
    "model.nipq.safetensors": "packed file",
    "model.onnx": "ONNX",
    "packed.onnx": "ONNX with `--pack`",
    "model.npz": "arrays",
    "model.pt2": "`torch.export` program",
    "OpenVINO": "OpenVINO",
}
#: Runtimes of the trained runs, as the pages call them.
RUNTIMES = {
    "program": "`torch.export` program",
    "faithful": "ONNX Runtime, faithful session",
    "faithful, packed": "the same, file with `--pack`",
    "openvino": "OpenVINO",
    "default": "ONNX Runtime, default session",
}


table = partial(table_of, numbers=True)


def where(records: Sequence[Record]) -> str:
    """Command, machine and versions, on one line."""
    first = records[-1]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    return f"{first['machine']['processor']}, {first['machine']['cores']} cores; {versions}"


def rung(record: Record, name: str, artifact: str) -> Record | None:
    """One rung of one artifact, or None if it did not climb it."""
    rungs = record.get("rungs", [])
    return next((found for found in rungs if (found["name"], found["artifact"]) == (name, artifact)), None)


def mark(found: Record | None) -> str:
    """Return whether a rung holds, in a word."""
    return "" if found is None else "holds" if found["passed"] else "**fails**"


def zoo() -> str:
    """E0 and E1 of networks with random weights."""
    records = lines_of(RESULTS / "zoo.jsonl")
    if not records:
        return NOTHING
    rows, held, reasons = [], 0, []
    for record in records:
        name = re.sub("^timm[/-]", "", record["name"])
        source = "timm" if record["name"].startswith("timm") else "torchvision"
        static, layers = (rung(record, wanted, "model.onnx") for wanted in ("E0 static", "E1 layers"))
        if static is None or layers is None:
            rows.append([f"{name} ({source})", record.get("size", ""), record.get("layers", ""), "", "", "", "", ""])
            reasons.append(f"{name}: {record.get('error') or (static or {}).get('first_difference')}")
            continue
        numbers = layers["numbers"]
        held += static["passed"] and layers["passed"]
        reasons += [
            f"{name}: {found['first_difference']}"
            for found in (static, layers)
            if found["first_difference"] is not None
        ]
        found = (f"{numbers['codes']:,}", f"{numbers['flips']:,}", f"{numbers['worst_output']:.1e}") if numbers else ()
        cells = (record["size"], record["layers"], mark(static), mark(layers), *(found or ("", "", "")))
        rows.append([f"{name} ({source})", *cells])
    headings = ("network", "image", "layers", "E0", "E1", "codes compared", "of them flipped", "worst output")
    failures = "".join(f"\n- {reason}" for reason in reasons)
    measured = {record["name"].replace("/", "-") for record in records}
    missing = [name for name in NETWORKS if name.replace("/", "-") not in measured]
    return (
        f"E0 and E1 hold for {held} of {len(records)} networks with random weights, batch norms with gains of both "
        "signs, random bits of 2 to 8 for each weight and each input, and clipping ranges of weights by turns for "
        "tensors and channels. Codes are those that arrive at the next quantizer; flipped ones were rounded to the "
        "other of two levels; outputs are in units of a layer's largest.\n\n"
        + table(headings, rows)
        + (f"\nWhat does not hold:\n{failures}\n" if reasons else "")
        + (f"\nNot measured yet: {', '.join(missing)}.\n" if missing else "")
        + f"\n`{records[0]['command'].rsplit(' ', 1)[0]}`, seed {records[0].get('seed', 0)}; {where(records)}.\n"
    )


def groups() -> dict[str, list[Record]]:
    """Trained runs by group."""
    found: dict[str, list[Record]] = {}
    for record in lines_of(RESULTS / "trained.jsonl"):
        found.setdefault(record["group"], []).append(record)
    return found


def passed(records: Sequence[Record], name: str, artifact: str) -> str:
    """Count the runs that pass a check, of those that make it."""
    found = [one for record in records if (one := rung(record, name, artifact)) is not None]
    return f"{sum(one['passed'] for one in found)} of {len(found)}" if found else ""


def trained() -> str:
    """E0 to E3 of trained runs, by group and artifact."""
    rows, notes = [], []
    found = groups()
    if not found:
        return NOTHING
    for group, records in found.items():
        sound = [record for record in records if "error" not in record]
        notes += [f"{group}, {record['name']}: {record['error']}" for record in records if "error" in record]
        for artifact, title in ARTIFACTS.items():
            counts = [passed(sound, name, artifact) for name in RUNGS]
            rows += [[group, title, *counts]] if any(counts) else []
            for record in sound:
                for name in RUNGS:
                    one = rung(record, name, artifact)
                    if one is not None and not one["passed"]:
                        notes.append(f"{group}, {record['name']}, {title}, {name}: {one['first_difference']}")
        older = [record for record in sound if not record["own_file"]["passed"]]
        if older:
            reason = older[0]["own_file"]["first_difference"].split(": ", 1)[-1]
            notes.append(
                f"{group}: the packed file that the run itself wrote differs from its trained model as it is read "
                f"today in {len(older)} of {len(sound)} runs, for instance {older[0]['name']}: {reason}"
            )
    every = [record for records in found.values() for record in records]
    return (
        f"{len(every)} trained models, each written anew:\n\n"
        + table(("models", "written as", "E0", "E1", "E2", "E3"), rows)
        + ("\nWhat does not hold:\n" + "".join(f"\n- {note}" for note in notes) + "\n" if notes else "")
        + f"\n{commands(every)}; {where(every)}.\n"
    )


def commands(records: Sequence[Record]) -> str:
    """The commands of trained runs, without the run's name."""
    return ", ".join(f"`{one}`" for one in sorted({record["command"].rsplit("/", 1)[0] for record in records}))


def runtimes() -> str:
    """Table of the distance of each runtime from the deployed model, and the task's metric there."""
    rows = []
    every = []
    for group, records in groups().items():
        sound = [record for record in records if "error" not in record]
        every += sound
        if not sound:
            continue
        unit = sound[0]["task"]["unit"]
        ours = [record["differences"]["deployed"]["metric"] for record in sound]
        rows.append([f"{group}, models: {len(sound)}; deployed", "", "", f"{statistics.fmean(ours):.2f} {unit}"])
        for name, title in RUNTIMES.items():
            found = [record["differences"][name] for record in sound if name in record["differences"]]
            if found:
                largest, mean = max(one["largest"] for one in found), statistics.fmean(one["mean"] for one in found)
                metric = statistics.fmean(one["metric"] for one in found)
                rows.append([title, f"{largest:.1e}", f"{mean:.1e}", f"{metric:.2f} {unit}"])
    if not rows:
        return NOTHING
    return (
        table(("on trained models", "largest difference of a logit", "mean", "metric, mean"), rows)
        + "\nDifferences from the deployed model in units of its largest logit, on up to "
        + f"{max(record['samples'] for record in every)} test samples. {commands(every)}; {where(every)}.\n"
    )


def sizes() -> str:
    """Bytes by format."""
    records = lines_of(RESULTS / "sizes.jsonl")
    if not records:
        return NOTHING
    titles = {"digits": "trained model of the digits", "resnet18": "ResNet-18, random bits"}
    titles |= {"mobilenet_v2": "MobileNet-v2, random bits"}
    files = list(records[0]["files"])
    rows: list[list[Any]] = [
        ["float32 state", *(f"{record['float32']:,}" for record in records)],
        ["sum of N * b / 8 over the weights", *(f"{record['payload']:,.0f}" for record in records)],
        ["that, and scales and what stays float", *(f"{_needed(record):,.0f}" for record in records)],
        *([name, *(f"{record['files'][name]:,}" for record in records)] for name in files),
        ["packed file above what it needs", *(f"{100 * above(record):.1f} %" for record in records)],
    ]
    within = [titles[record["name"]] for record in records if above(record) <= 0.02]
    beyond = [titles[record["name"]] for record in records if above(record) > 0.02]
    share = [record["header"] / record["layers"] for record in records]
    promise = all(record["promised"] == record["files"][files[0]] for record in records)
    return (
        table(("bytes", *(titles[record["name"]] for record in records)), rows)
        + f"\nThe packed file is within 2 % of bits, scales and what stays float for {', '.join(within) or 'none'}"
        + (f", not for {', '.join(beyond)}" if beyond else "")
        + f": its header names every layer with its shape, kind, bits and grid, {min(share):.0f} to {max(share):.0f} "
        + "bytes a layer however large its weight. "
        + ("`nipq.export.packed_write.file_bytes` promised every packed file to the byte. " if promise else "")
        + f"`{records[0]['command']}`, seed {records[-1]['seed']}; {where(records)}.\n"
    )


def _needed(record: Record) -> float:
    return float(record["payload"] + record["scales"])


def above(record: Record) -> float:
    """Overhead of the packed file beside bits, scales and what stays float, as a share of them."""
    return next(iter(record["files"].values())) / _needed(record) - 1


def latency(runtime: str) -> str:
    """Milliseconds and speed against the same runtime's own float.

    Args:
        runtime: ``openvino`` or ``inductor``.
    """
    records = [record for record in lines_of(RESULTS / "latency.jsonl") if record["runtime"] == runtime]
    sound = [record for record in records if "error" not in record]
    if not sound:
        return NOTHING
    rows = []
    for record in sound:
        for name, row in record["rows"].items():
            low, median, high = row["milliseconds"]
            speed = f"{row['speed'][1]:.2f} ({row['speed'][0]:.2f} to {row['speed'][2]:.2f})"
            place = f"{record['name']}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
            own = "" if name.endswith(" float") else speed
            rows.append([f"{place}: {name}", f"{median:.1f} ({low:.1f} to {high:.1f})", own])
    kernels = [
        f"{record['name']} {form}: {found['integer']} of {found['layers']}"
        for record in sound
        if record["threads"] == 1
        for form, found in record["kernels"].items()
    ]
    failed = "".join(f"\n- {r['name']}, {r['threads']} threads: {r['error']}" for r in records if "error" in r)
    return (
        table(("one image of 224x224", "milliseconds", "times its own float"), rows)
        + "\nMedian and quartiles over "
        + f"{sound[0]['rounds']} interleaved rounds, of CPU time with one thread and of wall "
        + "time with two; mixed is 2 to 8 bits at random; the float forms have "
        + f"the same random weights. Layers in integer kernels: {'; '.join(kernels)}.\n{failed}"
        + f"\n`{sound[0]['command']}`, seed {sound[0]['seed']}, load before at most "
        + f"{max(record['load_before'] for record in sound):.1f}; {where(sound)}.\n"
    )


#: Blocks of the pages by name.
BLOCKS: dict[str, Callable[[], str]] = {
    "export-runtimes": runtimes,
    "export-sizes": sizes,
    "verify-random": zoo,
    "verify-trained": trained,
    "latency-openvino": partial(latency, "openvino"),
    "latency-inductor": partial(latency, "inductor"),
}
