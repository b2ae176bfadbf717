"""Quantizer modules of weights and layer inputs: fake quantization in training, whole codes in deployment.

A quantizer holds what the noise proxy and the true quantizer share (paper: the two can be swapped at any moment because
``alpha`` and ``bits`` are the same numbers) and picks between them by :class:`~nipq.config.Phase`:

===========  =========================  ==================================
phase        ``model.train()``          ``model.eval()``
===========  =========================  ==================================
``float``    x                          x
``noise``    the noise proxy, or a      the true quantizer
             baseline's estimator
``round``    the true quantizer         the true quantizer
``int``      whole codes                whole codes
===========  =========================  ==================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nipq.config import BitRange, GridChoice, Init, Phase
from nipq.errors import ConfigError, OrderError
from nipq.functional.counter_rng import draw_key
from nipq.functional.grid import SIGNED, UNSIGNED, Grid
from nipq.functional.uniform import widened
from nipq.kernels.dispatch import quantize
from nipq.nn.estimators import Estimator, NoiseProxy
from nipq.nn.parameters import QuantizerParameters
from nipq.nn.weight_view import WeightView, WrittenWeight


class TensorQuantizer(QuantizerParameters):
    """Clipping range, bit-width and grid of one tensor, and the map from the tensor to its quantized self.

    Args:
        name: full name of the tensor in the model, for messages, such as ``"layer1.0.conv1.weight"``.
        bit_range: allowed bit-widths, and where learning starts.
        channels: number of clipping ranges; 1 for one per tensor.
        channel_axis: axis of the tensor along which the clipping ranges run; ignored when ``channels`` is 1.
        grid: where the levels lie.
        estimator: what training does.
        init: how the first clipping range is set from data, see ``nipq.nn.init``.
        learns_range: ``False`` leaves the clipping range as it was set, though the method would learn it.

    Raises:
        ConfigError: if ``channels`` is below 1.
    """

    def __init__(
        self,
        name: str,
        bit_range: BitRange,
        *,
        channels: int = 1,
        channel_axis: int = 0,
        grid: Grid = SIGNED,
        estimator: Estimator = NoiseProxy(),  # noqa: B008 -- frozen
        init: Init = "mse",
        learns_range: bool = True,
    ) -> None:
        super().__init__(
            name, bit_range, channels=channels, channel_axis=channel_axis, grid=grid,
            learns_range=learns_range and estimator.learns_range(self.role),
        )  # fmt: skip
        self.estimator = estimator
        self.init = init
        self.phase = Phase.NOISE

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` as the phase says.

        Half-precision inputs are computed in float32 and returned in their own type, so that steps are not rounded.

        Args:
            x: the tensor, any shape whose channel axis matches.

        Returns:
            A tensor of the shape and type of ``x``; in phase ``int`` whole codes instead of values.

        Raises:
            OrderError: if the clipping range was never set.
        """
        if self.phase is Phase.FLOAT:
            return x
        if not self.calibrated:
            raise OrderError(
                f"{self.name}: expected a calibrated clipping range, found none. "
                "Call nipq.calibrate_(model, loader) after nipq.prepare_ and before training or evaluating."
            )
        if self.phase is Phase.INT:
            return self.codes(widened(x))
        self.follow_(x)
        if not self.training:
            return quantize(x, self.alpha_for(x), self.whole_bits(), self.grid)
        if self.phase is Phase.ROUND:
            return self.estimator.round(self, x, self.whole_bits())
        return self._search(x, draw_key(x.device))

    def _search(self, x: Tensor, key: Tensor) -> Tensor:
        return self.estimator.search(self, x, key)

    @torch.no_grad()
    def follow_(self, x: Tensor) -> None:
        """Take the clipping range from the tensor itself, where the method does so; no effect otherwise."""
        if self.alpha_raw.requires_grad or not self.estimator.follows(self.role):
            return
        alpha = self.estimator.follow(self, widened(x.detach()))
        if alpha is not None:
            self.set_alpha_(alpha)

    def extra_repr(self) -> str:
        """Bit-width, clipping range and grid at a glance."""
        low, high = self.bit_range.choices[0], self.bit_range.choices[-1]
        bits = f"{self.bits_rounded}" if self.is_frozen else f"{float(self.bits.detach()):.2f} in {low}..{high}"
        alpha = f"{float(self.alpha.detach().mean()):.4g}" if self.calibrated else "not calibrated"
        return f"bits={bits}, alpha={alpha}, grid={self.grid.kind}, phase={self.phase}"


class WeightQuantizer(TensorQuantizer):
    """The quantizer of a weight, registered as its parametrization: ``layer.weight`` is the quantized tensor."""

    role = "weight"

    def __init__(self, name: str, bit_range: BitRange, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(name, bit_range, **settings)
        self.written = WrittenWeight(name)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the weight as the phase says; what is written to the result goes to the float weight.

        Args:
            x: the float weight.
        """
        quantized = super().forward(x)
        return quantized if quantized is x else self.written.view(quantized, x)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Store an assigned weight as it is (``layer.weight = w`` replaces the float weight).

        What is written in place and then assigned, as by ``layer.weight += d``, is in the float weight already.
        """
        return weight.target.detach().clone() if isinstance(weight, WeightView) else weight


class InputQuantizer(TensorQuantizer):
    """The quantizer of a layer's input, called from a forward pre-hook; one clipping range per tensor.

    Args:
        name: full name, such as ``"layer1.0.conv1.input"``.
        bit_range: allowed bit-widths, and where learning starts.
        grid_choice: ``"auto"`` lets calibration choose the grid.
        **settings: as for :class:`TensorQuantizer`.
    """

    def __init__(
        self,
        name: str,
        bit_range: BitRange,
        *,
        grid_choice: GridChoice = "auto",
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name, bit_range, **settings)
        if self.grid.kind in ("balanced", "full"):
            raise ConfigError(
                f"{name}: expected a signed, unsigned or shifted grid for an input, found a {self.grid.kind} one. "
                "That kind is for weights; choose one of the others."
            )
        self.grid_choice = grid_choice

    def replaces_relu(self, x: Tensor) -> bool:
        """Return whether a ReLU in front would change nothing about what the next call gives; see ``nipq.nn.relu``.

        Args:
            x: what the ReLU is given.
        """
        return (
            self.training
            and self.calibrated
            and self.phase in (Phase.NOISE, Phase.ROUND)
            and self.grid.kind == "unsigned"
            and "forward" not in self.__dict__
            and self.estimator.is_fused(self, x)
        )


class OffsetInputQuantizer(InputQuantizer):
    """Input quantizer of LSQ+ with a learned offset: the range is offset to offset + alpha.

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
