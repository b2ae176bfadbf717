"""The input quantizer of LSQ+: the low end of its range is a parameter, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import BitRange
from nipq.functional.grid import UNSIGNED, Grid
from nipq.nn.quantizer import InputQuantizer


class OffsetInputQuantizer(InputQuantizer):
    """An :class:`~nipq.nn.quantizer.InputQuantizer` with a learned offset: the range is offset to offset + alpha.

    The grid is at any moment the shifted one whose shift is minus the offset, so evaluation, files and checks treat it
    like every other shifted grid.

    Args:
        name: full name of the tensor.
        bit_range: allowed bit-widths.
        **settings: as for ``InputQuantizer``.
    """

    def __init__(self, name: str, bit_range: BitRange, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(name, bit_range, **settings)
        self.grid = Grid("shifted")

    @property
    def grid(self) -> Grid:
        """The grid with the present offset (reads a value: not for a training step)."""
        offset = self._parameters.get("offset")
        return UNSIGNED if offset is None else Grid("shifted", max(0.0, -float(offset.detach())))

    @grid.setter
    def grid(self, grid: Grid) -> None:
        if "offset" not in self._parameters:
            self.offset = nn.Parameter(torch.zeros(1))
        with torch.no_grad():
            self.offset.fill_(-grid.shift)

    def _round(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        return super()._round(x, self.offset if offset is None else offset)

    def _learn(self, x: Tensor, key: Tensor, offset: Tensor | None = None) -> Tensor:
        return super()._learn(x, key, self.offset if offset is None else offset)
