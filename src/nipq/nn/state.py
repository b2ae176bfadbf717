"""A quantizer's settings inside a state dict: JSON bytes in a tensor, so that a state dict holds tensors only."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from nipq.config import BitRange
from nipq.errors import FileFormatError
from nipq.functional.grid import Grid

#: Bytes. ``torch.distributed.checkpoint`` reads into tensors of the size they had when they were written, whatever the
#: grid or calibration says since.
BLOCK = 256


@dataclass(frozen=True)
class QuantizerState:
    """What a quantizer's parameters and buffers do not say.

    Attributes:
        grid: where the levels lie; chosen by calibration.
        bit_range: the range that the bit parameter is read in.
        calibrated: whether the boundary means anything yet.
    """

    grid: Grid
    bit_range: BitRange
    calibrated: bool

    def to_tensor(self) -> Tensor:
        """The settings as bytes of JSON, uint8, with blanks up to a whole number of blocks."""
        settings = {
            "grid": self.grid.kind,
            "shift": self.grid.shift,
            "choices": self.bit_range.choices,
            "calibrated": self.calibrated,
        }
        text = json.dumps(settings)
        return torch.tensor(list(text.ljust(-(-len(text) // BLOCK) * BLOCK).encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, state: Tensor, name: str) -> QuantizerState:
        """Read what :meth:`to_tensor` wrote.

        Args:
            state: the bytes.
            name: full name of the quantized tensor, for the message.

        Raises:
            FileFormatError: if somebody else wrote them.
        """
        try:
            settings = json.loads(bytes(state.tolist()).decode())
            grid = Grid(settings["grid"], float(settings["shift"]))
            return cls(grid, BitRange(allowed=settings["choices"]), bool(settings["calibrated"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileFormatError(
                f"{name}: expected the settings that nipq writes into a state dict, found something else ({error}). "
                "Load a state dict of a model prepared by nipq."
            ) from error
