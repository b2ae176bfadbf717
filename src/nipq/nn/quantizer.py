"""The modules that own quantizer parameters: one boundary and one bit-width for one tensor.

A quantizer holds what the noise proxy and the true quantizer share (paper: the two can be swapped at any moment because
``alpha`` and ``bits`` are the same numbers) and picks between them by :class:`~nipq.phases.Phase`:

===========  =========================  ==================================
phase        ``model.train()``          ``model.eval()``
===========  =========================  ==================================
``float``    x                          x
``noise``    the noise proxy, or a      the true quantizer
             rival's estimator
``round``    the true quantizer         the true quantizer
``int``      whole codes                whole codes
===========  =========================  ==================================
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nipq.config import BitRange, GridChoice, Init
from nipq.errors import OrderError
from nipq.functional.bitwidth import stochastic_round_bits
from nipq.functional.counter_rng import draw_key, unit_draw
from nipq.functional.empirical import error_table
from nipq.functional.grid import SIGNED, Grid
from nipq.functional.uniform import widened
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.backend import Backend, backend
from nipq.kernels.proxy import fused_noise_proxy
from nipq.kernels.rounding import quantize
from nipq.nn.estimator import Estimator, Role
from nipq.nn.parameters import QuantizerParameters
from nipq.phases import Phase


class TensorQuantizer(QuantizerParameters):
    """Boundary, bit-width and grid of one tensor, and the map from the tensor to its quantized self.

    Args:
        name: full name of the tensor in the model, for messages, such as ``"layer1.0.conv1.weight"``.
        bit_range: allowed bit-widths, and where learning starts.
        channels: number of boundaries; 1 for one per tensor.
        channel_axis: axis of the tensor along which the boundaries run; ignored when ``channels`` is 1.
        grid: where the levels lie.
        estimator: what training does.
        init: how the first boundary is set from data, see ``nipq.nn.init``.
        learns_boundary: ``False`` leaves the boundary as it was set, though the method would learn it.

    Raises:
        ConfigError: if ``channels`` is below 1.
    """

    #: Share of the true error in the noise, 0 to 1, shape (1,); None stands for 0 at no cost. See ``temper_``.
    error_share: Tensor | None
    #: Upper end of the ReLU6 that the tensor comes from, see ``nipq.nn.relu``.
    cap: float = math.inf
    role: ClassVar[Role] = "input"

    def __init__(
        self,
        name: str,
        bit_range: BitRange,
        *,
        channels: int = 1,
        channel_axis: int = 0,
        grid: Grid = SIGNED,
        estimator: Estimator = Estimator(),  # noqa: B008 -- frozen
        init: Init = "mse",
        learns_boundary: bool = True,
    ) -> None:
        super().__init__(
            name, bit_range, channels=channels, channel_axis=channel_axis, grid=grid,
            learns_boundary=learns_boundary and estimator.learns_boundary(self.role),
        )  # fmt: skip
        self.estimator = estimator
        self.init = init
        self.phase = Phase.NOISE
        self.register_buffer("error_share", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` as the phase says.

        Half-precision inputs are computed in float32 and returned in their own type, so that steps are not rounded.

        Args:
            x: the tensor, any shape whose channel axis matches.

        Returns:
            A tensor of the shape and type of ``x``; in phase ``int`` whole codes instead of values.

        Raises:
            OrderError: if the boundary was never set.
        """
        if self.phase is Phase.FLOAT:
            return x
        if not self.calibrated:
            raise OrderError(
                f"{self.name}: expected a calibrated boundary, found none. "
                "Call nipq.calibrate_(model, loader) after nipq.prepare_ and before training or evaluating."
            )
        if self.phase is Phase.INT:
            return self.codes(widened(x))
        if self.estimator.follows(self.role) and not self.alpha_raw.requires_grad:
            self._follow(x)
        if not self.training:
            return quantize(x, self._spread(self.alpha, x.ndim), self._whole_bits(), self.grid)
        if self.phase is Phase.ROUND:
            return self._round(x)
        key = draw_key(x.device)
        fused = self.estimator.has_fused_twin and self.error_share is None
        kernels = backend(x, self.alpha_raw, self.channel_axis) if fused else None
        if kernels is None:
            return self._learn(widened(x), key).to(x.dtype)
        return self._learn_fused(x, key, kernels)

    def _round(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        alpha = self._spread(self.alpha, x.ndim)
        bits, count = self._whole_bits(), self._count(x)
        return self.estimator.round(x, alpha, bits, self.grid, count=count, offset=offset, cap=self.cap)

    def _learn(self, x: Tensor, key: Tensor, offset: Tensor | None = None) -> Tensor:
        """What training sees of ``x`` while the bit-width is learned."""
        alpha, bits, share = self._spread(self.alpha, x.ndim), self._training_bits(key), self.error_share
        return self.estimator.learn(
            x, alpha, bits, self.grid, key, count=self._count(x), offset=offset, error_share=share
        )

    def _learn_fused(self, x: Tensor, key: Tensor, kernels: Backend) -> Tensor:
        """The same from one kernel, which takes the parameters themselves."""
        settings = ProxySettings(
            self.grid, self.bit_range.low, self.bit_range.high, self.bit_range.choices,
            self.estimator.stochastic_bits, self.channel_axis, self.cap,
        )  # fmt: skip
        tensors = ProxyTensors(self.alpha_raw, key, self._parameters.get("bit_raw"), self._buffers.get("bits_frozen"))
        if self.estimator.noise == "empirical":
            bits, alpha = self._training_bits(key).detach(), self._spread(self.alpha.detach(), x.ndim)
            table = error_table(x.detach(), alpha, bits, self.grid, cap=self.cap)
            tensors = replace(tensors, bits=bits, table=table.errors, table_count=table.inside)
        return fused_noise_proxy(x, tensors, settings, kernels)

    def _count(self, x: Tensor) -> int:
        """Elements of one sample, or of one boundary of a weight: what LSQ divides its gradients by."""
        return x.numel() // (len(x) if self.role == "input" and x.ndim else self.alpha_raw.numel())

    def _training_bits(self, key: Tensor) -> Tensor:
        if self.is_frozen:
            return self.bits
        if not self.estimator.learns_bits:
            raise OrderError(
                f"{self.name}: expected a fixed bit-width, as {self.estimator.method} gives it no gradient; found one "
                "that is to be learned. Fix it in the config, or by nipq.set_bits_(model, bits), before training."
            )
        if self.estimator.real_bits:
            return self.bits
        if self.estimator.stochastic_bits:
            return stochastic_round_bits(self.bits, self.bit_range.choices, unit_draw(key))
        return self._whole_bits()

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Take the boundary from the tensor itself, where the method does so."""
        axis = self.channel_axis if self.alpha_raw.numel() > 1 else None
        alpha = self.estimator.follow(
            self.role, widened(x), self.alpha, self.bits_rounded, self.grid, axis, training=self.training
        )
        if alpha is not None:
            self.set_alpha_(alpha)

    def extra_repr(self) -> str:
        """Bit-width, boundary and grid at a glance."""
        low, high = self.bit_range.choices[0], self.bit_range.choices[-1]
        bits = f"{self.bits_rounded}" if self.is_frozen else f"{float(self.bits.detach()):.2f} in {low}..{high}"
        alpha = f"{float(self.alpha.detach().mean()):.4g}" if self.calibrated else "not calibrated"
        return f"bits={bits}, alpha={alpha}, grid={self.grid.kind}, phase={self.phase}"


class WeightQuantizer(TensorQuantizer):
    """The quantizer of a weight, registered as its parametrization: ``layer.weight`` is the quantized tensor."""

    role = "weight"

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Store an assigned weight as it is (``layer.weight = w`` replaces the float weight)."""
        return weight


class InputQuantizer(TensorQuantizer):
    """The quantizer of a layer's input, called from a forward pre-hook; one boundary per tensor.

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
        self.grid_choice = grid_choice

    def replaces_relu(self, x: Tensor) -> bool:
        """Whether a ReLU in front would change nothing about what the next call gives; see ``nipq.nn.relu``.

        Args:
            x: what the ReLU is given.
        """
        return (
            self.training
            and self.calibrated
            and self.phase in (Phase.NOISE, Phase.ROUND)
            and self.grid.kind == "unsigned"
            and self.estimator.has_fused_twin
            and self.error_share is None
            and "forward" not in self.__dict__
            and backend(x, self.alpha_raw, self.channel_axis) is not None
        )
