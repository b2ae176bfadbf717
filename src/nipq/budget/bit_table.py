"""Every bit-width of a prepared model in one vector, for budgets, search and freeze."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nipq.errors import NonFiniteError, OrderError
from nipq.functional.bitwidth import bits_from_raw
from nipq.nn.parameters import QuantizerParameters
from nipq.nn.quantizer import TensorQuantizer
from nipq.prepare.layer_table import LayerRow


class BitTable:
    """The tensors that have a bit-width, weights first and each once, and their bits as one vector.

    Built from the rows of :func:`nipq.prepare.layer_table.layer_table`. The vector is computed for all tensors
    together: one concatenation, one sigmoid, no value read back to the host.

    Args:
        rows: the prepared layers.

    Attributes:
        weights: weight quantizers; layers that share a weight share one. Keys and values stand for weights. Of those
            that share a bit-width, here and among inputs, the first stands for all.
        inputs: input quantizers, one for each layer whose input is quantized.
        weight_of_input: for each input, the place of its layer's weight quantizer in ``weights``.
        place: place of each tensor in the vector.
        choices: allowed bit-widths of each tensor, ascending; just one when frozen.
    """

    def __init__(self, rows: Sequence[LayerRow]) -> None:
        owned = [(_owner(row.weight), None if row.input is None else _owner(row.input)) for row in rows]
        weight_of = {own: weight for weight, own in reversed(owned) if own is not None}
        self.weights: tuple[TensorQuantizer, ...] = tuple(dict.fromkeys(weight for weight, _ in owned))
        self.inputs: tuple[TensorQuantizer, ...] = tuple(dict.fromkeys(own for _, own in owned if own is not None))
        self.place = {member: place for place, group in enumerate(self.members) for member in group}
        weights = [self.place[weight_of[own]] for own in self.inputs]
        self.weight_of_input = torch.tensor(weights, dtype=torch.int64)
        self.choices = tuple(
            (quantizer.bits_rounded,) if quantizer.is_frozen else quantizer.bit_range.choices
            for quantizer in self.quantizers
        )
        self._learned = [quantizer for quantizer in self.quantizers if not quantizer.is_frozen]
        learned = [place for place, quantizer in enumerate(self.quantizers) if not quantizer.is_frozen]
        widest = max(len(choices) for choices in self.choices)
        padded = [[*choices, *[choices[-1]] * (widest - len(choices))] for choices in self.choices]
        self._tensors = {
            "place": torch.tensor(learned, dtype=torch.int64),
            "low": torch.tensor([quantizer.bit_range.low for quantizer in self._learned]),
            "high": torch.tensor([quantizer.bit_range.high for quantizer in self._learned]),
            "choices": torch.tensor(padded, dtype=torch.float64),
        }
        self.to(self.quantizers[0].alpha_raw.device)

    @property
    def quantizers(self) -> tuple[TensorQuantizer, ...]:
        """All tensors' quantizers in the order of the vector: weights, then inputs."""
        return (*self.weights, *self.inputs)

    @property
    def members(self) -> tuple[tuple[QuantizerParameters, ...], ...]:
        """For each entry of the vector the tensors whose bit-width it is."""
        return tuple(tuple(quantizer.bit_group) for quantizer in self.quantizers)

    @property
    def device(self) -> torch.device:
        """Where the vector is computed."""
        return self._tensors["choices"].device

    def to(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}

    def bits(self) -> Tensor:
        """Bit-widths now, float64, shape (W + L,): continuous where learned, differentiable in every ``bit_raw``.

        Raises:
            OrderError: if a bit-width was frozen after this table was built.
        """
        bits = self._tensors["choices"][:, 0]
        if not self._learned:
            return bits
        try:
            raw = torch.cat([quantizer.bit_raw for quantizer in self._learned])
        except AttributeError:
            frozen = next(quantizer.name for quantizer in self._learned if quantizer.is_frozen)
            raise OrderError(
                f"{frozen}: expected a bit-width that is still learned, found one that was frozen since. "
                "A search ends when bits are frozen; build a new Search to go on with the others."
            ) from None
        # Ends as tensors instead of numbers: the same formula, for tensors of different ranges at once.
        low, high = self._tensors["low"], self._tensors["high"]
        learned = bits_from_raw(raw.float(), low, high)  # type: ignore[arg-type]  # see above
        return bits.index_copy(0, self._tensors["place"], learned.double())

    def round(self, bits: Tensor) -> Tensor:
        """Nearest allowed bit-widths (the lower of two that are equally near), with identity gradient.

        Args:
            bits: bit-widths, shape (W + L,).

        Returns:
            Whole numbers held as float64, shape of ``bits``.
        """
        choices = self._tensors["choices"]
        nearest = (choices - bits.detach()[:, None]).abs().argmin(1, keepdim=True)  # the first, that is lower, of two
        return choices.gather(1, nearest)[:, 0] + (bits - bits.detach())

    def split(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of weights, shape (W,), and bits of inputs, shape (L,): what :func:`nipq.functional.cost.cost` takes."""
        return bits[: len(self.weights)], bits[len(self.weights) :]

    def check_finite(self, bits: Tensor) -> None:
        """Refuse bit-widths that are not numbers (reads values: not for every step on a GPU).

        Args:
            bits: bit-widths, shape (W + L,).

        Raises:
            NonFiniteError: naming the first tensor whose bit-width is NaN or infinite.
        """
        if bool(torch.isfinite(bits).all()):
            return
        first = int(torch.isfinite(bits).logical_not().nonzero()[0, 0])
        raise NonFiniteError(
            f"{self.quantizers[first].name}: expected a finite bit-width, found {bits[first].item()}. "
            "Lower the learning rate of the bits, or look for a loss that is not finite before this step."
        )


def _owner(quantizer: TensorQuantizer) -> TensorQuantizer:
    owner = quantizer.bit_owner
    assert isinstance(owner, TensorQuantizer)
    return owner
