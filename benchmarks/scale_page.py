"""Cost of bits at scale, from the committed file; for ``experiments/write_results.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import record
from benchmarks.speed_page import origin
from experiments.shown import table

Record = dict[str, Any]

GPUS = 64
TOKENS = 8192
"""Of a step, on each GPU."""
BANDWIDTH, FLOPS, USED = 3.35e12, 989e12, 0.4
"""Bytes and dense bf16 operations a second on an H100 SXM, by its data sheet, and the share of them that is assumed."""


@dataclass(frozen=True)
class Decoder:
    """A decoder of Llama's shape; the numbers are those with which 7B models are published.

    Attributes:
        blocks: how many.
        hidden: width.
        inner: width of the gated feed-forward part.
        vocabulary: tokens.
    """

    blocks: int = 32
    hidden: int = 4096
    inner: int = 11008
    vocabulary: int = 32000

    @property
    def block_weights(self) -> int:
        """Weights of one block: query, key, value, output; gate, up, down."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        """All weights that are quantized, embedding and head included."""
        return self.blocks * self.block_weights + 2 * self.vocabulary * self.hidden

    @property
    def weight_quantizers(self) -> int:
        """Seven linear layers a block, embedding and head."""
        return 7 * self.blocks + 2

    @property
    def input_quantizers(self) -> int:
        """Inputs of seven linear layers and of both sides of two attention products a block, and of the head."""
        return (7 + 4) * self.blocks + 1

    @property
    def quantizers(self) -> int:
        """Tensors with a clipping range and a bit-width."""
        return self.weight_quantizers + self.input_quantizers


def measured(content: Record) -> str:
    """Tables of what was counted and timed."""
    points: Record = content["measured"]
    headings = ["quantizers", *(f"{int(count):,}" for count in points)]
    rows = [
        ["parameters, B", *(f"{point['memory']['parameters']:,}" for point in points.values())],
        ["gradients, B", *(f"{point['memory']['gradients']:,}" for point in points.values())],
        ["states of Adam, B", *(f"{point['memory']['adam']:,}" for point in points.values())],
        ["Python objects, KiB", *(f"{point['memory']['python'] / 1024:,.0f}" for point in points.values())],
        ["kept for backward, float, KiB", *_kept(points, "float")],
        ["kept for backward, quantized, KiB", *_kept(points, "quantized")],
        ["the same, blocks of ten layers recomputed, KiB", *_kept(points, "quantized, blocks of ten recomputed")],
        ["sent in a step, DDP, float, B", *_sent(points, "DDP, float")],
        ["sent in a step, DDP, quantized, B", *_sent(points, "DDP")],
        ["sent for quantizers, FSDP2, B in one message", *_sent(points, "FSDP, quantizers")],
        ["sent by penalty and `search.step`, B", *_sent(points, "penalty and search.step")],
        ["said by each rank at `freeze_bits_`, B", *_sent(points, "freeze_bits_")],
        [
            "memory of `freeze_bits_` while it runs, KiB",
            *(f"{p['memory']['snap'] / 1024:,.0f}" for p in points.values()),
        ],
    ]
    rows += [
        [f"{part}, us", *(f"{point['microseconds'][part][1]:,.0f}" for point in points.values())]
        for part in content["lines"]
    ]
    return (
        table(headings, rows) + f"\nChains of linear layers of {content['width']} x "
        f"{content['width']} without bias, two quantizers each, batches of {content['batch']}; two gloo processes for "
        "what is sent; times are medians on one thread. " + origin(content)
    )  # fmt: skip


def _kept(points: Record, name: str) -> list[str]:
    return [f"{point['saved'][name] / 1024:,.1f}" for point in points.values()]


def _sent(points: Record, name: str) -> list[str]:
    return [f"{point['messages'][name]['bytes']:,}" for point in points.values()]


def extrapolated(content: Record) -> str:
    """The formulas with their numbers."""
    model = Decoder()
    n, q = model.weights, model.quantizers
    last = max(content["measured"], key=int)
    largest = content["measured"][last]["memory"]
    each = {name: largest[name] / int(last) for name in ("parameters", "gradients", "adam", "python")}
    device = each["parameters"] + each["gradients"] + each["adam"]
    snap = largest["snap"] / int(last)
    said = content["measured"][last]["messages"]["freeze_bits_"]["bytes"] / int(last)
    traffic = 3 * 2 * n * (GPUS - 1) / GPUS
    quantizing, training = 10 * n / BANDWIDTH, 6 * n * TOKENS / (USED * FLOPS)
    rows = [
        ["quantizers Q", "11 inputs and 7 weights a block, 2 weights and 1 input besides", f"{q:,}"],
        ["weights N", "blocks (4 h^2 + 3 h f) + 2 v h", f"{n / 1e9:.2f} billion"],
        ["on each GPU: parameters, gradients, Adam", f"{device:.1f} B x Q", f"{device * q / 1024:.1f} KiB"],
        [
            "in each process: Python objects",
            f"{each['python'] / 1024:.1f} KiB x Q",
            f"{each['python'] * q / 2**20:.1f} MiB",
        ],
        ["sent for quantizers in a step", "8 B x Q, one message", f"{8 * q / 1024:.1f} KiB"],
        [
            "sent for weights in a step (FSDP2, bf16)",
            f"two gatherings and one reduction: 3 x 2 B x N x {GPUS - 1}/{GPUS}",
            f"{traffic / 1e9:.1f} GB",
        ],
        ["their ratio", "", f"{8 * q / traffic:.1g}"],
        ["said at the freeze by each rank, once", f"{said:.0f} B x Q", f"{said * q / 1024:.0f} KiB"],
        ["memory of the freeze while it runs", f"{snap / 1024:.1f} KiB x Q", f"{snap * q / 2**20:.1f} MiB"],
        *([f"{part}, on this CPU", _formula(line), _time(line, q)] for part, line in content["lines"].items()),
        [
            "sent for calibration, once",
            "65,536 values x 4 B for each input",
            f"{65536 * 4 * model.input_quantizers / 1e6:.0f} MB",
        ],
        [
            "the model whole, float32, in each process until `shard_`, and in `nipq train` between stages",
            "4 B x N",
            f"{4 * n / 1e9:.1f} GB",
        ],
        ["quantized weights kept for backward", "2 B x N (bf16)", f"{2 * n / 1e9:.1f} GB"],
        ["the same, each block recomputed", "2 B x (4 h^2 + 3 h f)", f"{2 * model.block_weights / 1e9:.2f} GB"],
        [
            "weights quantized on every GPU, forward and backward (assumed bandwidth)",
            f"10 B x N / {BANDWIDTH / 1e12:g} TB/s",
            f"{quantizing * 1e3:.0f} ms",
        ],
        [
            f"the step itself, {TOKENS:,} tokens a GPU (assumed speed)",
            f"6 N x tokens / ({USED:g} x {FLOPS / 1e12:g} TFLOP/s)",
            f"{training * 1e3:,.0f} ms",
        ],
        ["share of quantizing weights", "", f"{quantizing / training:.1%}"],
    ]
    worst = max(line["largest relative error"] for line in content["lines"].values())
    return (
        table(["", "formula", f"h = {model.hidden}, f = {model.inner}, v = {model.vocabulary}"], rows)
        + "\nBytes for each quantizer are those of the longest chain; times are the lines through all chains, of which "
        f"no point is further off than {worst:.0%}. "
        "Bandwidth and speed are a data sheet's and an assumption; nothing on this page ran on a GPU.\n"
    )


def _formula(line: Record) -> str:
    return f"{line['fixed']:.0f} us + {line['each']:.2f} us x Q"


def _time(line: Record, q: int) -> str:
    return f"{(line['fixed'] + line['each'] * q) / 1e3:.1f} ms"


def _block(show: Callable[[Record], str]) -> Callable[[], str]:
    def text() -> str:
        content = record.read("scale")
        return "Nothing is measured yet.\n" if content is None else show(content)

    return text


#: Blocks of the pages by name.
BLOCKS = {"scale-measured": _block(measured), "scale-decoder": _block(extrapolated)}
