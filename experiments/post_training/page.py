"""Table of post-training quantization, from the records; for ``experiments/write_results.py``."""

from __future__ import annotations

from pathlib import Path

from experiments.shown import lines_of, origin, table

HERE = Path(__file__).parent


def section() -> str:
    """Agreement with the float network by cell and state."""
    records = lines_of(HERE / "results.jsonl")
    rows = [
        [
            record["cell"],
            f"`{record['state']}`" if record["state"] == "nipq.quantize" else f"stage: {record['state']}",
            f"{record['agreement']:.1f} ± {record['standard_error']:.1f}",
            f"{record['divergence']:.3g}",
            f"{record['bytes']:,}" if "bytes" in record else "",
        ]
        for record in sorted(records, key=lambda record: (record["cell"], record["state"] != "nipq.quantize"))
    ]
    first = records[0]
    return (
        table(["bits W/A", "state", "agreement [%]", "KL(float, quantized), nats", "bytes"], rows)
        + f"\n{first['samples']} unlabelled calibration tiles, {first['tiles']} test tiles of other photographs, "
        f"{len({record['seed'] for record in records})} choice of calibration tiles; ± is the standard error over test "
        "tiles. Stages alone use all calibration tiles; `nipq.quantize` holds a quarter of them out. "
        f"`python -m experiments.post_training.run FOLDER --seeds 0`; {origin(records)}.\n"
    )


#: Blocks of this module by name.
BLOCKS = {"post-training": section}
