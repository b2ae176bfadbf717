"""Training methods behind one quantizer interface: NIPQ's noise proxy and the baselines LSQ, LSQ+, PACT, DiffQ and STE.

An estimator is the fake quantization of the training forward, with its gradients. Everything else (levels, clipping
range, bit-width, budget, deployment) is the same for all methods, so that a comparison changes one word of the
config. A new method is one subclass of :class:`Estimator` in :data:`ESTIMATORS`, and its name in
``nipq.config.Method``. The formulas are functions of tensors in :mod:`nipq.functional.proxy` and
:mod:`nipq.functional.baselines`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from nipq.config import Method, NoiseKind
from nipq.errors import OrderError
from nipq.functional.baselines import (
    lsq_quantize,
    pact_quantize,
    quantize_with_offset,
    running_range,
    sawb_range,
    untruncated_proxy,
)
from nipq.functional.bitwidth import stochastic_round_bits
from nipq.functional.clipping import max_range
from nipq.functional.counter_rng import unit_draw
from nipq.functional.noise import draw_noise, mixed_noise, true_error
from nipq.functional.uniform import widened
from nipq.kernels.arguments import ProxySettings, ProxyTensors
from nipq.kernels.dispatch import backend, noise_proxy, quantize
from nipq.nn.parameters import QuantizerParameters, Role


@dataclass(frozen=True)
class Estimator:
    """Base of the training methods: the true quantizer with straight-through gradients in both phases of training.

    Subclasses override what differs. All are given the quantizer's parameters, and read what they need.

    Attributes:
        noise: distribution of the pseudo-quantization noise of ``nipq`` and ``diffq``.
        stochastic_bits: draw a whole bit-width at every training forward (paper Eq. 15).
        clip_after_noise: keep the noise proxy inside the range (not in the paper).
        range_correction: add the T4b term to the gradient of the clipping range (not in the paper).
    """

    #: Name of the method in ``nipq.Config``.
    method: ClassVar[Method]
    #: Whether the low end of an input's range is a parameter, too.
    learns_offset: ClassVar[bool] = False

    noise: NoiseKind = "uniform"
    stochastic_bits: bool = True
    clip_after_noise: bool = False
    range_correction: bool = False

    def learns_range(self, role: Role) -> bool:  # noqa: ARG002 -- for subclasses
        """Return whether the clipping range of a weight, or of an input, is a parameter that an optimizer moves."""
        return True

    def follows(self, role: Role) -> bool:  # noqa: ARG002 -- for subclasses
        """Return whether the range of a weight, or of an input, is taken from the tensor itself by :meth:`follow`."""
        return False

    def is_fused(self, quantizer: QuantizerParameters, x: Tensor) -> bool:  # noqa: ARG002 -- for subclasses
        """Return whether fused kernels do both phases of training, a ReLU in front included; see ``nipq.nn.relu``."""
        return False

    def follow(self, quantizer: QuantizerParameters, x: Tensor) -> Tensor | None:  # noqa: ARG002 -- for subclasses
        """Clipping range from the tensor itself, at every forward.

        Args:
            quantizer: parameters of the tensor's quantizer.
            x: the tensor, without gradient, not in half precision.

        Returns:
            alpha, units of x, shape ``(channels,)``, or None to leave it as it is.
        """
        return None

    def training_bits(self, quantizer: QuantizerParameters, key: Tensor) -> Tensor:
        """Bit-width of one training forward in phase ``noise``, differentiable in its parameter.

        Args:
            quantizer: parameters of the tensor's quantizer.
            key: see ``nipq.functional.counter_rng.draw_key``.

        Returns:
            Shape (1,), >= 2; a whole number, except for DiffQ.
        """
        if self.stochastic_bits and not quantizer.is_frozen:
            return stochastic_round_bits(quantizer.bits, quantizer.bit_range.choices, unit_draw(key))
        return quantizer.whole_bits()

    def search(self, quantizer: QuantizerParameters, x: Tensor, key: Tensor) -> Tensor:
        """Training forward of phase ``noise``, in which bit-widths are learned.

        Args:
            quantizer: parameters of the tensor's quantizer.
            x: the tensor, any shape, floating point.
            key: of the noise, see ``nipq.functional.counter_rng.draw_key``.

        Returns:
            Shape and type of x.
        """
        return self.round(quantizer, widened(x), self.training_bits(quantizer, key)).to(x.dtype)

    def round(self, quantizer: QuantizerParameters, x: Tensor, bits: Tensor) -> Tensor:
        """Training forward of phase ``round``: the true quantizer, with the method's gradients.

        Args:
            quantizer: parameters of the tensor's quantizer.
            x: the tensor, any shape, floating point.
            bits: whole bit-width, shape (1,).

        Returns:
            Values on the grid, shape and type of x.
        """
        return quantize(x, quantizer.alpha_for(x), bits, quantizer.grid, quantizer.cap)


class NoiseProxy(Estimator):
    """NIPQ: pseudo-quantization noise of one step inside the clipping range, truncation outside.

    x + noise * step with step = alpha / n, noise ~ U(-1/2, 1/2) or drawn from the tensor's own rounding errors;
    clipping range, bit-width and value are learned by backpropagation through this, without a straight-through
    estimator. See ``nipq.functional.proxy.noise_proxy`` for the gradients.

    Paper: NIPQ (arXiv 2206.00820), sections 5 and 6.3. Not in it, and off unless asked for: ``clip_after_noise``,
    ``range_correction``, noise of other methods, and a share of the true error.
    """

    method: ClassVar[Method] = "nipq"

    def is_fused(self, quantizer: QuantizerParameters, x: Tensor) -> bool:
        """Return whether there is a kernel for the tensor, and nothing was added to the paper's method."""
        plain = quantizer.error_share is not None or not self._settings(quantizer).is_fused
        return not plain and backend(x, quantizer.alpha_raw, quantizer.channel_axis) is not None

    def search(self, quantizer: QuantizerParameters, x: Tensor, key: Tensor) -> Tensor:
        """The noise proxy, from the raw parameters, so that one kernel can do it all."""
        tensors = ProxyTensors(
            quantizer.alpha_raw, key, quantizer._parameters.get("bit_raw"), quantizer._buffers.get("bits_frozen"),
            error_share=quantizer.error_share,
        )  # fmt: skip
        return noise_proxy(x, tensors, self._settings(quantizer))

    def _settings(self, quantizer: QuantizerParameters) -> ProxySettings:
        bit_range = quantizer.bit_range
        return ProxySettings(
            quantizer.grid, bit_range.low, bit_range.high, bit_range.choices, self.stochastic_bits,
            quantizer.channel_axis, quantizer.cap, self.noise, self.clip_after_noise, self.range_correction,
        )  # fmt: skip


class LSQ(Estimator):
    """LSQ: rounding with straight-through gradients, and a learned step.

    d Q / d alpha = (Q(x) - x) / alpha in range and +-1 beyond its ends, times LSQ's factor 1 / sqrt(count n), where
    count is the number of elements of a weight's range or of one sample of an input. See ``lsq_quantize``.

    Paper: LSQ (arXiv 1902.08153), sections 2.1 and 2.2. Different here: the parameter is alpha_raw, with alpha =
    softplus(alpha_raw) and step = alpha / n, and the factor makes up for that; bit-widths may be learned along.
    """

    method: ClassVar[Method] = "lsq"

    def round(self, quantizer: QuantizerParameters, x: Tensor, bits: Tensor) -> Tensor:
        """The true quantizer with LSQ's factor on the gradient of the clipping range."""
        count = quantizer.elements_per_range(x)
        return lsq_quantize(x, quantizer.alpha_for(x), bits, quantizer.grid, count, quantize)


class LSQPlus(LSQ):
    """LSQ+: LSQ for weights, and for inputs a range from offset to offset + alpha whose low end is learned as well.

    See ``quantize_with_offset`` for the gradients.

    Paper: LSQ+ (arXiv 2004.09576), Eq. 1 to 4. Different here: the offset is rounded to the grid, so that zero is a
    code and the deployed form is that of every shifted grid.
    """

    method: ClassVar[Method] = "lsq+"
    learns_offset: ClassVar[bool] = True

    def round(self, quantizer: QuantizerParameters, x: Tensor, bits: Tensor) -> Tensor:
        """LSQ, with the offset where the quantizer has one."""
        offset = quantizer._parameters.get("offset")
        if offset is None:
            return super().round(quantizer, x, bits)
        count = quantizer.elements_per_range(x)
        return quantize_with_offset(widened(x), quantizer.alpha_for(x), offset, bits, count).to(x.dtype)


class PACT(Estimator):
    """PACT with SAWB: an input's range learns from the values that it truncates, a weight's follows its two moments.

    d Q / d alpha = 1 where x >= alpha, else 0 (``pact_quantize``); for weights alpha = c1 sqrt(E w^2) - c2 E|w|
    (``sawb_range``). Bit-widths get no gradient and have to be fixed.

    Paper: PACT (arXiv 1805.06085), Eq. 3; SAWB (arXiv 1807.06964), section 3. Different here: inputs on a signed grid
    are truncated at both ends, and SAWB's coefficients are fitted for grids with a level at zero.
    """

    method: ClassVar[Method] = "pact"

    def learns_range(self, role: Role) -> bool:
        """Return True for inputs only: a weight's range follows its moments."""
        return role == "input"

    def follows(self, role: Role) -> bool:
        """Return True for weights only: an input's range is learned."""
        return role == "weight"

    def follow(self, quantizer: QuantizerParameters, x: Tensor) -> Tensor | None:
        """Clipping range of a weight by SAWB."""
        if quantizer.role != "weight":
            return None
        return sawb_range(x, quantizer.bits_rounded, channel_axis=quantizer.range_axis)

    def training_bits(self, quantizer: QuantizerParameters, key: Tensor) -> Tensor:  # noqa: ARG002 -- nothing is drawn
        """The fixed bit-width.

        Raises:
            OrderError: if the bit-width is still learned.
        """
        if not quantizer.is_frozen:
            raise OrderError(
                f"{quantizer.name}: expected a fixed bit-width, as {self.method} gives it no gradient; found one "
                "that is to be learned. Fix it in the config, or call nipq.prepare.layer_table.set_bits_(model, bits) "
                "before training."
            )
        return quantizer.bits

    def round(self, quantizer: QuantizerParameters, x: Tensor, bits: Tensor) -> Tensor:
        """The true quantizer with PACT's gradient of the clipping range."""
        return pact_quantize(widened(x), quantizer.alpha_for(x), bits, quantizer.grid).to(x.dtype)


class DiffQ(Estimator):
    """DiffQ: pseudo-quantization noise everywhere, truncation nowhere, at the real bit-width.

    x + noise * step with step = alpha / n and alpha the largest magnitude: of a weight at every forward, of an input
    its running mean while training. See ``untruncated_proxy``.

    Paper: DiffQ (arXiv 2104.09987), Eq. 5 and 6. Different here: the symmetric grid of the other methods, uniform noise
    unless ``noise="gaussian"`` (the default of its code), and inputs are quantized, too.
    """

    method: ClassVar[Method] = "diffq"

    def learns_range(self, role: Role) -> bool:  # noqa: ARG002 -- for neither
        """Return False: the range is the largest magnitude."""
        return False

    def follows(self, role: Role) -> bool:  # noqa: ARG002 -- for both
        """Return True: the range is the largest magnitude of the tensor itself."""
        return True

    def follow(self, quantizer: QuantizerParameters, x: Tensor) -> Tensor | None:
        """Largest magnitude of a weight; of an input its running mean, in training only."""
        if quantizer.role == "weight":
            return max_range(x, quantizer.grid, channel_axis=quantizer.range_axis)
        return running_range(quantizer.alpha.detach(), x, quantizer.grid) if quantizer.training else None

    def training_bits(self, quantizer: QuantizerParameters, key: Tensor) -> Tensor:  # noqa: ARG002 -- nothing is drawn
        """The bit-width itself, not a whole number near it."""
        return quantizer.bits

    def search(self, quantizer: QuantizerParameters, x: Tensor, key: Tensor) -> Tensor:
        """DiffQ's pseudo-quantization: noise without truncation."""
        wide, bits = widened(x), self.training_bits(quantizer, key)
        alpha, grid = quantizer.alpha_for(x), quantizer.grid
        seen, fixed = wide.detach(), (alpha.detach(), bits.detach(), grid)
        noise = draw_noise(self.noise, seen, *fixed, key)
        if quantizer.error_share is not None:
            noise = mixed_noise(noise, true_error(seen, *fixed), quantizer.error_share)
        return untruncated_proxy(wide, alpha, bits, noise, grid).to(x.dtype)


class STE(Estimator):
    """The plain straight-through estimator: rounding in the forward, the identity in the backward, a fixed range.

    Paper: Bengio et al. (arXiv 1308.3432). The range stays where calibration put it; bit-widths may be learned, by the
    gradient of the step.
    """

    method: ClassVar[Method] = "ste"

    def learns_range(self, role: Role) -> bool:  # noqa: ARG002 -- for neither
        """Return False: calibration sets the range."""
        return False


#: Estimators by the name of their method.
ESTIMATORS: dict[Method, type[Estimator]] = {kind.method: kind for kind in (NoiseProxy, LSQ, LSQPlus, PACT, DiffQ, STE)}


def estimator_of(method: Method, **switches: Any) -> Estimator:  # noqa: ANN401 -- each switch has its own type
    """The estimator of a method.

    Args:
        method: its name in ``nipq.Config``.
        **switches: attributes of :class:`Estimator`.

    Example:
        >>> estimator_of("lsq+", stochastic_bits=False)
        LSQPlus(noise='uniform', stochastic_bits=False, clip_after_noise=False, range_correction=False)
    """
    return ESTIMATORS[method](**switches)
