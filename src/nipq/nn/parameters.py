"""Learned parameters of one tensor's quantizer, and what a state dict keeps of it.

The clipping range, the bit-width and the grid of a tensor are the numbers that every training method, the true
quantizer and a deployed file have in common; :mod:`nipq.nn.quantizer` says what is done with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nipq.config import BitRange
from nipq.errors import ConfigError, FileFormatError, OrderError
from nipq.functional.bitwidth import bits_from_raw, raw_from_bits, round_bits
from nipq.functional.clipping import alpha_from_raw, raw_from_alpha, spread_along
from nipq.functional.grid import BALANCED, Grid, code_range, fitting_grid, step_size, zero_point
from nipq.functional.packing import FEWEST_BITS, MOST_BITS
from nipq.functional.uniform import integer_codes, widened

Role = Literal["weight", "input"]

#: Bytes. ``torch.distributed.checkpoint`` reads into tensors of the size they had when they were written, whatever the
#: grid or calibration says since.
BLOCK = 256


@dataclass(frozen=True)
class QuantizerState:
    """State of a quantizer besides its parameters and buffers, kept in a state dict as JSON.

    Attributes:
        grid: where the levels lie; chosen by calibration.
        bit_range: the range that the bit parameter is read in.
        calibrated: whether the clipping range was set from data yet.
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
            FileFormatError: if another program wrote them.
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


class QuantizerParameters(nn.Module):
    """The parameters of one tensor's quantizer.

    ``alpha = softplus(alpha_raw)`` and ``bits = low + (high - low) * sigmoid(bit_raw)``, with ``low`` and ``high`` the
    ends of ``bit_range``. A fixed or frozen bit-width is an integer buffer ``bits_frozen`` instead of a parameter, so
    that no optimizer can move it (fault B9 in ``docs/internals/paper-map.md``). The grid and the bit range travel in
    the state dict as a byte tensor of JSON, hence a state dict is all that has to be saved.

    Args:
        name: full name of the tensor in the model, for messages, such as ``"layer1.0.conv1.weight"``.
        bit_range: allowed bit-widths, and where learning starts.
        channels: number of clipping ranges; 1 for one per tensor.
        channel_axis: axis of the tensor along which the clipping ranges run; ignored when ``channels`` is 1.
        grid: where the levels lie.
        learns_range: whether gradients move the clipping range.

    Raises:
        ConfigError: if ``channels`` is below 1.
    """

    bit_raw: nn.Parameter
    bits_frozen: Tensor
    #: Share of the true error in the noise, 0 to 1, shape (1,); None stands for 0 at no cost. See
    #: ``set_noise_mix_``.
    error_share: Tensor | None
    #: Upper end of the ReLU6 that the tensor comes from, see ``nipq.nn.relu``.
    cap: float = math.inf
    role: ClassVar[Role] = "input"

    def __init__(
        self, name: str, bit_range: BitRange, *, channels: int, channel_axis: int, grid: Grid, learns_range: bool
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"{name}: expected at least one clipping range, found {channels}. Give 1 or more.")
        self.name = name
        self.bit_range = bit_range
        self.channel_axis = channel_axis
        self.grid = grid
        #: Whether balanced levels were asked for; ``grid`` is the symmetric one where they do not fit the bit-width.
        self.asks_balanced = grid.kind == "balanced"
        self.calibrated = False
        self.learns_range = learns_range
        self.alpha_raw = nn.Parameter(torch.zeros(channels), requires_grad=learns_range)
        #: Quantizers with one bit-width between them, this one among them; a list of theirs, so not submodules.
        self.bit_group: list[QuantizerParameters] = [self]
        if bit_range.fixed is not None:
            self.register_buffer("bits_frozen", torch.tensor([bit_range.fixed]))
            self.grid = fitting_grid(grid, bit_range.fixed)
        else:
            start = torch.tensor([bit_range.start], dtype=torch.float64)
            raw = raw_from_bits(start, bit_range.low, bit_range.high)
            self.bit_raw = nn.Parameter(raw.to(torch.float32))
        self.register_buffer("error_share", None, persistent=False)

    @property
    def alpha(self) -> Tensor:
        """Clipping range, units of x, > 0, shape ``(channels,)``; never in half precision, as steps follow from it."""
        return alpha_from_raw(widened(self.alpha_raw))

    @property
    def is_frozen(self) -> bool:
        """True if the bit-width is a whole number that no optimizer sees."""
        return "bits_frozen" in self._buffers

    @property
    def bits(self) -> Tensor:
        """Bit-width, unit bit, shape ``(1,)``: continuous while it is learned, whole once frozen."""
        if self.is_frozen:
            return self.bits_frozen.to(widened(self.alpha_raw).dtype)
        return bits_from_raw(widened(self.bit_raw), self.bit_range.low, self.bit_range.high)

    @property
    def bits_rounded(self) -> int:
        """The allowed bit-width nearest to :attr:`bits` (reads a value: not for a training step)."""
        return int(self.whole_bits().item())

    @property
    def bit_owner(self) -> QuantizerParameters:
        """The first of those that share the bit-width: what stands for all of them where bit-widths are chosen."""
        return self.bit_group[0]

    def share_bits_with_(self, others: Iterable[QuantizerParameters]) -> None:
        """Give others, and those that share with them already, this one's bit-width, learned, frozen now or later.

        Args:
            others: of the same bit range.
        """
        for other in others:
            for member in other.bit_group if other.bit_group is not self.bit_group else ():
                self.bit_group.append(member)
                member.bit_group = self.bit_group
                if not self.is_frozen:
                    member.bit_raw = self.bit_raw

    @torch.no_grad()
    def freeze_bits_(self, bits: int) -> None:
        """Turn the bit-width into an integer buffer, in all quantizers that share it.

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
        for quantizer in self.bit_group:
            if not quantizer.is_frozen:
                del quantizer.bit_raw
            whole = torch.tensor([int(bits)], device=quantizer.alpha_raw.device)
            quantizer.register_buffer("bits_frozen", whole)
            if quantizer.asks_balanced:
                quantizer.grid = fitting_grid(BALANCED, bits)

    @torch.no_grad()
    def set_alpha_(self, alpha: Tensor) -> None:
        """Set the clipping range, in units of x, and mark the quantizer as calibrated.

        Args:
            alpha: clipping range, finite and > 0, shape ``(channels,)`` or broadcastable to it.

        Raises:
            ConfigError: if a clipping range is not finite and positive.
        """
        if not bool((torch.isfinite(alpha) & (alpha > 0)).all()):
            raise ConfigError(
                f"{self.name}: expected finite clipping ranges above 0, found {alpha.flatten().tolist()[:4]}. "
                "Set a clipping range in units of the tensor, such as its largest magnitude."
            )
        self.alpha_raw.copy_(raw_from_alpha(alpha.to(self.alpha_raw)).expand_as(self.alpha_raw))
        self.calibrated = True

    def whole_bits(self) -> Tensor:
        """Bit-width rounded to the nearest allowed one, straight-through, shape ``(1,)``."""
        return self.bits if self.is_frozen else round_bits(self.bits, self.bit_range.choices)

    def spread(self, per_channel: Tensor, ndim: int) -> Tensor:
        """Shape ``(channels,)`` to a shape that broadcasts along the channel axis of a tensor of ``ndim`` axes."""
        return spread_along(per_channel, self.channel_axis, ndim)

    @property
    def range_axis(self) -> int | None:
        """Axis of the tensor along which the clipping ranges run, or None where there is one for all."""
        return self.channel_axis if self.alpha_raw.numel() > 1 else None

    def alpha_for(self, x: Tensor) -> Tensor:
        """Clipping range in a shape that broadcasts with the tensor."""
        return self.spread(self.alpha, x.ndim)

    def elements_per_range(self, x: Tensor) -> int:
        """Elements of one sample of an input, or of one clipping range of a weight."""
        return x.numel() // (len(x) if self.role == "input" and x.ndim else self.alpha_raw.numel())

    def step(self) -> Tensor:
        """Value of one code, units of x, shape ``(channels,)``: the number that a file stores.

        The step of the true quantizer, or half of it on a balanced grid, whose codes are odd.
        """
        return step_size(self.alpha, self.whole_bits(), self.grid) / self.grid.codes_per_step

    def zero_point(self) -> Tensor:
        """Whole code that stands for 0 in the stored (unsigned) counting, shape ``(channels,)``."""
        return zero_point(self.alpha, self.whole_bits(), self.grid)

    def code_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest code relative to the zero point, each of shape ``(channels,)`` or ``(1,)``."""
        low, high = code_range(self.alpha, self.whole_bits(), self.grid)
        return low * self.grid.codes_per_step, high * self.grid.codes_per_step

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Whole codes of ``x`` relative to the zero point, as floats; the code of 0 is 0, or 1 on a balanced grid."""
        bits, grid = self.whole_bits(), self.grid
        numbers = (step_size(self.alpha, bits, grid), *code_range(self.alpha, bits, grid))
        codes = integer_codes(x, *(self.spread(number, x.ndim) for number in numbers), level_offset=grid.level_offset)
        return codes * grid.codes_per_step

    def get_extra_state(self) -> Tensor:
        """Grid, bit range and calibration mark, see :class:`~QuantizerState`."""
        return QuantizerState(self.grid, self.bit_range, self.calibrated).to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` wrote."""
        saved = QuantizerState.from_tensor(state, self.name)
        self.grid, self.calibrated = saved.grid, saved.calibrated
        # A symmetric grid may stand in for the balanced one that was asked for; it is so no more at fewer bits.
        stands_in = (
            self.asks_balanced and self.is_frozen and saved.grid == fitting_grid(BALANCED, int(self.bits_frozen))
        )
        self.asks_balanced = stands_in or saved.grid.kind == "balanced"
        if saved.bit_range.choices != self.bit_range.choices:
            self.bit_range = saved.bit_range  # the meaning of bit_raw depends on the range it was trained with

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bit_owner is not self and not keep_vars and f"{prefix}bit_raw" in destination:
            destination[f"{prefix}bit_raw"] = destination[f"{prefix}bit_raw"].clone()  # savers refuse shared memory

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
        if not self.is_frozen:
            for member in self.bit_group:  # load_state_dict(..., assign=True) gives each a parameter of its own
                member.bit_raw = self.bit_raw
