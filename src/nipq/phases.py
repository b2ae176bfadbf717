"""The four things a quantizer can do with a tensor."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What the quantizers of a model do in the forward pass.

    ``FLOAT`` passes the tensor on untouched; ``NOISE`` adds pseudo-quantization noise while training (and rounds in
    evaluation); ``ROUND`` rounds with straight-through gradients; ``INT`` computes on integer-valued codes, which is
    what a deployed model does.

    Example:
        >>> Phase("noise") is Phase.NOISE
        True
    """

    FLOAT = "float"
    NOISE = "noise"
    ROUND = "round"
    INT = "int"
