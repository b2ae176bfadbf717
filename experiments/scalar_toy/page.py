"""Table of the scalar toy, from its record; for ``experiments/write_results.py``."""

from __future__ import annotations

from pathlib import Path

from experiments.shown import lines_of, table


def section() -> str:
    """Both schedules side by side, and how the numbers were made."""
    (record,) = lines_of(Path(__file__).parent / "results.jsonl")
    late, flips = f"distance_last_{record['last']}", f"flips_last_{record['last']}"
    rows = []
    for label, found in record["methods"].items():
        fading, constant = found["cosine"], found["constant"]
        rows.append([
            label, f"{fading['distance']:.3f} ± {fading['distance_deviation']:.3f}",
            f"{100 * fading['farther_share']:.1f} %", f"{fading[late]:.3f}", f"{fading[flips]:.1f}",
            f"{constant[late]:.3f}", f"{constant[flips]:.1f}",
        ])  # fmt: skip
    headings = ["trained with", "final distance", "farther level", "mean distance", "flips"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        table([*headings, "mean distance, constant rate", "flips, constant rate"], rows)
        + f"\nDistance: |Q(x) - t| in grid steps, mean of {record['targets']} targets and {record['seeds']} seeds "
        f"(± standard deviation over seeds); the nearest levels are {record['nearest_level_distance']:.3f} away. "
        f"Farther level: share of runs that end on it. Mean distance and flips (changes of level of one weight): over "
        f"the last {record['last']} of {record['steps']} steps. Learning rate {record['rate']}, falling to 0 by half "
        f"a cosine unless said otherwise. `{record['command']}`; {record['machine']['cores']} cores, one thread, "
        f"{record['seconds']:.0f} s; {versions}.\n"
    )


#: Blocks of the pages by name.
BLOCKS = {"oscillation": section}
