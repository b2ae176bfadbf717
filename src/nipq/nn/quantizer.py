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

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nipq.config import BitRange, GridChoice, Init
from nipq.errors import ConfigError, OrderError
from nipq.functional.bitwidth import bits_from_raw, raw_from_bits, round_bits, stochastic_round_bits
from nipq.functional.boundary import alpha_from_raw, raw_from_alpha
from nipq.functional.grid import SIGNED, Grid, code_range, step_size, zero_point
from nipq.functional.uniform import integer_codes, quantize
from nipq.nn.estimator import Estimator, Role
from nipq.nn.state import QuantizerState
from nipq.phases import Phase

#: Bit-widths that a file can hold; ``BitRange`` refuses others, and so does ``freeze_bits_``.
FEWEST_BITS, MOST_BITS = 2, 16


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class TensorQuantizer(nn.Module):
    """Boundary, bit-width and grid of one tensor, and the map from the tensor to its quantized self.

    ``alpha = softplus(alpha_raw)`` and ``bits = low + (high - low) * sigmoid(bit_raw)``, with ``low`` and ``high`` the
    ends of ``bit_range``. A fixed or frozen bit-width is an integer buffer ``bits_frozen`` instead of a parameter, so
    that no optimizer can move it (fault B9 in ``docs/paper_map.md``). The grid and the bit range travel in the state
    dict as a byte tensor of JSON, hence a state dict is all that has to be saved.

    Args:
        name: full name of the tensor in the model, for messages, such as ``"layer1.0.conv1.weight"``.
        bit_range: allowed bit-widths, and where learning starts.
        channels: number of boundaries; 1 for one per tensor.
        channel_axis: axis of the tensor along which the boundaries run; ignored when ``channels`` is 1.
        grid: where the levels lie.
        estimator: what training does.
        init: how the first boundary is set from data, see ``nipq.nn.initial``.

    Raises:
        ConfigError: if ``channels`` is below 1.
    """

    bit_raw: nn.Parameter
    bits_frozen: Tensor
    #: Share of the true error in the noise, 0 to 1, shape (1,); None stands for 0 at no cost. See ``temper_``.
    error_share: Tensor | None
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
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"{name}: expected at least one boundary, found {channels} channels. Give 1 or more.")
        self.name = name
        self.bit_range = bit_range
        self.channel_axis = channel_axis
        self.grid = grid
        self.estimator = estimator
        self.init = init
        self.phase = Phase.NOISE
        self.calibrated = False
        self.alpha_raw = nn.Parameter(torch.zeros(channels), requires_grad=estimator.learns_boundary(self.role))
        self.register_buffer("error_share", None, persistent=False)
        if bit_range.fixed is not None:
            self.register_buffer("bits_frozen", torch.tensor([bit_range.fixed]))
        else:
            start = torch.tensor([bit_range.start], dtype=torch.float64)
            raw = raw_from_bits(start, bit_range.low, bit_range.high)
            self.bit_raw = nn.Parameter(raw.to(torch.float32))

    @property
    def alpha(self) -> Tensor:
        """Boundary, units of x, > 0, shape ``(channels,)``; never in half precision, as the step is taken from it."""
        return alpha_from_raw(_widened(self.alpha_raw))

    @property
    def is_frozen(self) -> bool:
        """Whether the bit-width is a whole number that no optimizer sees."""
        return "bits_frozen" in self._buffers

    @property
    def bits(self) -> Tensor:
        """Bit-width, unit bit, shape ``(1,)``: continuous while it is learned, whole once frozen."""
        if self.is_frozen:
            return self.bits_frozen.to(_widened(self.alpha_raw).dtype)
        return bits_from_raw(_widened(self.bit_raw), self.bit_range.low, self.bit_range.high)

    @property
    def bits_rounded(self) -> int:
        """The allowed bit-width nearest to :attr:`bits` (reads a value: not for a training step)."""
        return int(self._whole_bits().item())

    @torch.no_grad()
    def freeze_bits_(self, bits: int) -> None:
        """Turn the bit-width into an integer buffer.

        Args:
            bits: bit-width, 2 to 16.

        Raises:
            ConfigError: if no file could hold that bit-width.
        """
        if not FEWEST_BITS <= bits <= MOST_BITS:
            raise ConfigError(
                f"{self.name}: expected a bit-width from {FEWEST_BITS} to {MOST_BITS}, found {bits}. "
                "Files hold no other; exclude the layer with a rule to keep it float."
            )
        device = self.alpha_raw.device
        if not self.is_frozen:
            del self.bit_raw
        self.register_buffer("bits_frozen", torch.tensor([int(bits)], device=device))

    @torch.no_grad()
    def set_alpha_(self, alpha: Tensor) -> None:
        """Set the boundary, in units of x, and mark the quantizer as calibrated.

        Args:
            alpha: boundary, finite and > 0, shape ``(channels,)`` or broadcastable to it.

        Raises:
            ConfigError: if a boundary is not finite and positive.
        """
        if not bool((torch.isfinite(alpha) & (alpha > 0)).all()):
            raise ConfigError(
                f"{self.name}: expected finite boundaries above 0, found {alpha.flatten().tolist()[:4]}. "
                "Set a boundary in units of the tensor, such as its largest magnitude."
            )
        self.alpha_raw.copy_(raw_from_alpha(alpha.to(self.alpha_raw)).expand_as(self.alpha_raw))
        self.calibrated = True

    def _whole_bits(self) -> Tensor:
        return self.bits if self.is_frozen else round_bits(self.bits, self.bit_range.choices)

    def _spread(self, per_channel: Tensor, ndim: int) -> Tensor:
        """Shape ``(channels,)`` to a shape that broadcasts along the channel axis of a tensor of ``ndim`` axes."""
        if per_channel.numel() == 1:
            return per_channel
        shape = [1] * ndim
        shape[self.channel_axis] = -1
        return per_channel.reshape(shape)

    def step(self) -> Tensor:
        """Step of the true quantizer, units of x, shape ``(channels,)``: the number that a file stores."""
        return step_size(self.alpha, self._whole_bits(), self.grid)

    def zero_point(self) -> Tensor:
        """Whole code that stands for 0 in the stored (unsigned) counting, shape ``(channels,)``."""
        return zero_point(self.alpha, self._whole_bits(), self.grid)

    def code_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest code relative to the zero point, each of shape ``(channels,)`` or ``(1,)``."""
        return code_range(self.alpha, self._whole_bits(), self.grid)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Whole codes of ``x`` relative to the zero point, so that the code of 0 is 0; floats, shape of ``x``."""
        low, high = self.code_range()
        spread = [self._spread(value, x.ndim) for value in (self.step(), low, high)]
        return integer_codes(x, *spread)

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
        wide = _widened(x)
        if self.phase is Phase.INT:
            return self.codes(wide)
        self._follow(wide)
        alpha = self._spread(self.alpha, x.ndim)
        if not self.training:
            return quantize(wide, alpha, self._whole_bits(), self.grid).to(x.dtype)
        return self._estimate(wide, alpha).to(x.dtype)

    def _estimate(self, x: Tensor, alpha: Tensor, offset: Tensor | None = None) -> Tensor:
        """What training sees of ``x``."""
        count = x.numel() // (len(x) if self.role == "input" and x.ndim else alpha.numel())
        if self.phase is Phase.ROUND:
            return self.estimator.round(x, alpha, self._whole_bits(), self.grid, count=count, offset=offset)
        bits, share = self._training_bits(), self.error_share
        return self.estimator.learn(x, alpha, bits, self.grid, count=count, offset=offset, error_share=share)

    def _training_bits(self) -> Tensor:
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
            return stochastic_round_bits(self.bits, self.bit_range.choices)
        return self._whole_bits()

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Take the boundary from the tensor itself, where the method does so."""
        if self.alpha_raw.requires_grad:
            return
        axis = self.channel_axis if self.alpha_raw.numel() > 1 else None
        alpha = self.estimator.follow(
            self.role, x, self.alpha, self.bits_rounded, self.grid, axis, training=self.training
        )
        if alpha is not None:
            self.set_alpha_(alpha)

    def get_extra_state(self) -> Tensor:
        """Grid, bit range and calibration mark, see :class:`~nipq.nn.state.QuantizerState`."""
        return QuantizerState(self.grid, self.bit_range, self.calibrated).to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` wrote."""
        saved = QuantizerState.from_tensor(state, self.name)
        self.grid, self.calibrated = saved.grid, saved.calibrated
        if saved.bit_range.choices != self.bit_range.choices:
            self.bit_range = saved.bit_range  # the meaning of bit_raw depends on the range it was trained with

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        frozen = state_dict.get(prefix + "bits_frozen")
        if frozen is not None and not self.is_frozen:
            self.freeze_bits_(int(frozen))
        elif self.is_frozen and prefix + "bit_raw" in state_dict:
            raise OrderError(
                f"{self.name}: expected a state dict with a fixed bit-width, found one that is still learned. "
                "Load it into a model prepared afresh with the same config."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

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
