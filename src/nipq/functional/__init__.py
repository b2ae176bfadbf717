"""The mathematics of the method, without state: everything here is a plain function of tensors."""

from __future__ import annotations

from nipq.functional.bitwidth import bits_from_raw, raw_from_bits, round_bits, stochastic_round_bits
from nipq.functional.clipping import alpha_from_raw, max_range, noise_optimal_range, raw_from_alpha
from nipq.functional.cost import CostForm, cost
from nipq.functional.grid import (
    SIGNED,
    UNSIGNED,
    Grid,
    code_range,
    levels,
    step_size,
    value_range,
    zero_point,
)
from nipq.functional.noise import empirical_noise, uniform_noise
from nipq.functional.proxy import noise_proxy
from nipq.functional.uniform import integer_codes, quantize

__all__ = [
    "SIGNED",
    "UNSIGNED",
    "CostForm",
    "Grid",
    "alpha_from_raw",
    "bits_from_raw",
    "code_range",
    "cost",
    "empirical_noise",
    "integer_codes",
    "levels",
    "max_range",
    "noise_optimal_range",
    "noise_proxy",
    "quantize",
    "raw_from_alpha",
    "raw_from_bits",
    "round_bits",
    "step_size",
    "stochastic_round_bits",
    "uniform_noise",
    "value_range",
    "zero_point",
]
