"""A quantizer's settings inside a state dict: JSON bytes in a tensor, so that a state dict holds tensors only.

What a quantizer learns and a file keeps: boundary, bit-width, grid, and the numbers that follow from them.

The modules that own quantizer parameters: one boundary and one bit-width for one tensor.

A quantizer holds what the noise proxy and the true quantizer share (paper: the two can be swapped at any moment because
``alpha`` and ``bits`` are the same numbers) and picks between them by :class:`~nipq.config.Phase`:

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

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nipq.config import BitRange, GridChoice, Init, Phase
from nipq.errors import ConfigError, FileFormatError, OrderError
from nipq.functional.bitwidth import bits_from_raw, raw_from_bits, round_bits, stochastic_round_bits
from nipq.functional.clipping import alpha_from_raw, raw_from_alpha
from nipq.functional.counter_rng import draw_key, unit_draw
from nipq.functional.grid import SIGNED, Grid, code_range, step_size, zero_point
from nipq.functional.noise import error_table
from nipq.functional.packing import FEWEST_BITS, MOST_BITS
from nipq.functional.uniform import integer_codes, widened
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.dispatch import Backend, backend
from nipq.kernels.fused import fused_noise_proxy, quantize
from nipq.nn.estimator import Estimator, Role

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


class QuantizerParameters(nn.Module):
    """The parameters of one tensor's quantizer.

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
        learns_boundary: whether gradients move the boundary.

    Raises:
        ConfigError: if ``channels`` is below 1.
    """

    bit_raw: nn.Parameter
    bits_frozen: Tensor

    def __init__(
        self, name: str, bit_range: BitRange, *, channels: int, channel_axis: int, grid: Grid, learns_boundary: bool
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"{name}: expected at least one boundary, found {channels} channels. Give 1 or more.")
        self.name = name
        self.bit_range = bit_range
        self.channel_axis = channel_axis
        self.grid = grid
        self.calibrated = False
        self.alpha_raw = nn.Parameter(torch.zeros(channels), requires_grad=learns_boundary)
        #: Quantizers with one bit-width between them, this one among them; a list of theirs, so not submodules.
        self.bit_group: list[QuantizerParameters] = [self]
        if bit_range.fixed is not None:
            self.register_buffer("bits_frozen", torch.tensor([bit_range.fixed]))
        else:
            start = torch.tensor([bit_range.start], dtype=torch.float64)
            raw = raw_from_bits(start, bit_range.low, bit_range.high)
            self.bit_raw = nn.Parameter(raw.to(torch.float32))

    @property
    def alpha(self) -> Tensor:
        """Boundary, units of x, > 0, shape ``(channels,)``; never in half precision, as the step is taken from it."""
        return alpha_from_raw(widened(self.alpha_raw))

    @property
    def is_frozen(self) -> bool:
        """Whether the bit-width is a whole number that no optimizer sees."""
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
        return int(self._whole_bits().item())

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

    def get_extra_state(self) -> Tensor:
        """Grid, bit range and calibration mark, see :class:`~nipq.nn.quantizer.QuantizerState`."""
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

    #: Share of the true error in the noise, 0 to 1, shape (1,); None stands for 0 at no cost. See ``set_noise_mix_``.
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
