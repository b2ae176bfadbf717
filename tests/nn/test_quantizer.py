from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

from nipq.config import BitRange, Phase
from nipq.errors import ConfigError, FileFormatError, OrderError
from nipq.functional.grid import SIGNED, UNSIGNED, Grid
from nipq.functional.uniform import quantize
from nipq.nn.estimators import NoiseProxy
from nipq.nn.quantizer import InputQuantizer, TensorQuantizer, WeightQuantizer

LEARNED = BitRange(min=2, max=8, start=3.3)


def quantizer(bits: BitRange = LEARNED, *, alpha: float | Tensor = 1.5, **settings: object) -> TensorQuantizer:
    made = TensorQuantizer("layer.weight", bits, **settings)  # type: ignore[arg-type]
    made.set_alpha_(torch.as_tensor(alpha))
    return made


# ---------------------------------------------------------------------- parameters


def test_parameters_have_one_axis_and_start_where_they_are_told() -> None:
    made = quantizer()
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {"alpha_raw": (1,), "bit_raw": (1,)}
    assert made.bits.item() == pytest.approx(3.3, abs=1e-5)
    assert made.bits_rounded == 3
    assert made.alpha.item() == pytest.approx(1.5, rel=1e-6)


def test_a_fixed_width_is_a_buffer_that_no_optimizer_sees() -> None:
    made = quantizer(BitRange(fixed=4))
    assert [name for name, _ in made.named_parameters()] == ["alpha_raw"]
    assert made.is_frozen
    assert made.bits_frozen.dtype == torch.int64
    assert made.bits.item() == made.bits_rounded == 4


def test_freezing_turns_the_parameter_into_a_buffer() -> None:
    made = quantizer()
    made.freeze_bits_(5)
    assert "bit_raw" not in dict(made.named_parameters())
    assert made.bits_rounded == 5
    made.freeze_bits_(2)  # frozen bits may still be moved by hand
    assert made.bits_rounded == 2


@pytest.mark.parametrize("bits", [1, 17])
def test_no_file_holds_fewer_than_2_or_more_than_16_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"layer.weight: expected a bit-width from 2 to 16, found {bits}"):
        quantizer().freeze_bits_(bits)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_boundary_is_finite_and_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"layer\.weight: expected finite clipping ranges above 0"):
        quantizer(alpha=alpha)


def test_at_least_one_boundary() -> None:
    with pytest.raises(ConfigError, match="at least one clipping range, found 0"):
        TensorQuantizer("x", LEARNED, channels=0)


# ---------------------------------------------------------------------- phases


def test_uncalibrated_forward_names_the_tensor_and_the_remedy() -> None:
    made = TensorQuantizer("features.0.input", LEARNED)
    with pytest.raises(OrderError, match=r"features\.0\.input: expected a calibrated clipping range.*calibrate_"):
        made(torch.zeros(3))


def test_phase_float_needs_no_boundary_and_changes_nothing() -> None:
    made = TensorQuantizer("x", LEARNED)
    made.phase = Phase.FLOAT
    x = torch.randn(5)
    assert made(x) is x


def test_noise_in_training_differs_between_forwards_and_from_evaluation() -> None:
    made, x = quantizer().train(), torch.randn(64)
    first, second = made(x), made(x)
    assert not torch.equal(first, second)
    made.eval()
    assert torch.equal(made(x), made(x))
    assert torch.equal(made(x), quantize(x, made.alpha, 3.0, SIGNED))


def test_phase_round_is_the_quantizer_in_training_too() -> None:
    made, x = quantizer(), torch.randn(64)
    made.phase = Phase.ROUND
    assert torch.equal(made.train()(x), made.eval()(x))


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED, Grid("shifted", 0.375)])
def test_codes_times_step_is_the_quantized_value(grid: Grid) -> None:
    made, x = quantizer(grid=grid).eval(), torch.randn(64)
    codes = made.codes(x)
    assert torch.equal(codes, codes.round())
    low, high = made.code_range()
    assert low.item() <= codes.min().item()
    assert codes.max().item() <= high.item()
    assert torch.equal(codes * made.step(), made(x))
    made.phase = Phase.INT
    assert torch.equal(made(x), codes)


def test_zero_has_code_zero_on_a_shifted_grid() -> None:
    made = quantizer(BitRange(fixed=4), alpha=6.0, grid=Grid("shifted", 0.375)).eval()
    assert made.zero_point().item() == 1
    assert made.codes(torch.zeros(1)).item() == 0
    assert made(torch.zeros(1)).item() == 0


def test_boundaries_per_channel_run_along_their_axis() -> None:
    alpha = torch.tensor([0.5, 1.0, 2.0])
    made = quantizer(BitRange(fixed=3), alpha=alpha, channels=3, channel_axis=1).eval()
    x = torch.randn(4, 3, 5)
    expected = torch.stack([quantize(x[:, c], alpha[c : c + 1], 3.0, SIGNED) for c in range(3)], dim=1)
    torch.testing.assert_close(made(x), expected)
    assert made.step().shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_in_its_own_type_after_float32_steps(dtype: torch.dtype) -> None:
    made, x = quantizer().eval(), torch.randn(64).to(dtype)
    assert made(x).dtype == dtype
    assert torch.equal(made(x), made(x.float()).to(dtype))
    assert made.train()(x).dtype == dtype


def test_the_step_of_a_half_precision_model_is_float32() -> None:
    assert quantizer().to(torch.bfloat16).step().dtype == torch.float32


# ---------------------------------------------------------------------- bits in training


def test_stochastic_bits_visit_the_two_neighbours_in_proportion() -> None:
    # One draw of 2 or 8 bits per forward decides the largest noise: 8 bits leave it below alpha / 2 / 127.
    made = quantizer(BitRange(allowed=(2, 8), start=5.0)).train()
    x = torch.zeros(50)
    draws = 400
    coarse = sum(made(x).abs().max().item() > 1.5 / 2 / 127 * 1.01 for _ in range(draws))
    # Mean 1/2; five standard errors are 5 * sqrt(1/4 / 400).
    assert abs(coarse / draws - 0.5) < 0.125


def test_bits_are_not_drawn_when_asked_not_to() -> None:
    made = quantizer(BitRange(start=3.3), estimator=NoiseProxy(stochastic_bits=False)).train()
    largest = max(made(torch.zeros(500)).abs().max().item() for _ in range(50))
    assert 0.95 * 0.25 < largest <= 0.25 * (1 + 1e-6)  # always 3 bits: step 0.5, noise at most half of it


def test_both_parameters_get_a_gradient_in_training() -> None:
    made = quantizer().train()
    made(torch.randn(64)).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0, name


def test_clip_after_noise_keeps_the_range() -> None:
    x = torch.full((1000,), 1.49)
    assert quantizer().train()(x).max().item() > 1.5
    assert quantizer(estimator=NoiseProxy(clip_after_noise=True)).train()(x).max().item() <= 1.5 * (1 + 1e-6)


def test_empirical_noise_is_the_tensors_own_error() -> None:
    # Half of the values lie on a level of the 3-bit grid, half a quarter step above one: so do the errors.
    made = quantizer(BitRange(fixed=3), estimator=NoiseProxy(noise="empirical")).train()
    x = torch.tensor([0.5, 0.625]).repeat(50)
    noise = (made(x) - x) / made.step()
    assert {round(value, 3) for value in noise.tolist()} == {0.0, -0.25}


# ---------------------------------------------------------------------- saving


def test_state_dict_carries_grid_range_and_calibration() -> None:
    saved = quantizer(BitRange(allowed=(2, 4, 8)), grid=Grid("shifted", 0.2785))
    twin = TensorQuantizer("twin", BitRange(allowed=(2, 4, 8)))
    twin.load_state_dict(saved.state_dict(), strict=True)
    assert twin.grid == saved.grid
    assert twin.calibrated
    assert twin.bit_range.choices == (2, 4, 8)
    x = torch.randn(20)
    assert torch.equal(twin.eval()(x), saved.eval()(x))
    assert all(isinstance(value, Tensor) for value in saved.state_dict().values())


def test_a_learned_width_keeps_its_meaning_under_another_range() -> None:
    saved, twin = quantizer(BitRange(min=2, max=14, start=7.0)), TensorQuantizer("twin", BitRange())
    twin.load_state_dict(saved.state_dict())
    assert twin.bits.item() == pytest.approx(7.0, abs=1e-5)


def test_a_frozen_state_freezes_the_twin_that_loads_it() -> None:
    saved, twin = quantizer(), TensorQuantizer("twin", LEARNED)
    saved.freeze_bits_(6)
    twin.load_state_dict(saved.state_dict(), strict=True)
    assert twin.is_frozen
    assert twin.bits_rounded == 6


def test_a_learned_state_does_not_thaw_a_frozen_quantizer() -> None:
    saved, frozen = quantizer(), quantizer()
    frozen.freeze_bits_(6)
    with pytest.raises(OrderError, match=r"layer\.weight: expected a state dict with a fixed bit-width"):
        frozen.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("text", ["not json", json.dumps({"grid": "round"}), json.dumps([1])])
def test_foreign_settings_in_a_state_dict_are_refused_by_name(text: str) -> None:
    state = quantizer().state_dict()
    state["_extra_state"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(FileFormatError, match=r"layer\.weight: expected the settings that nipq writes"):
        quantizer().load_state_dict(state)


def test_a_copy_is_independent() -> None:
    made = quantizer()
    twin = copy.deepcopy(made)
    twin.set_alpha_(torch.tensor(9.0))
    twin.freeze_bits_(2)
    assert made.alpha.item() == pytest.approx(1.5)
    assert not made.is_frozen


def test_the_kinds_say_what_they_are() -> None:
    assert "bits=3.30 in 2..8, alpha=1.5, grid=signed, phase=noise" in repr(quantizer())
    frozen = WeightQuantizer("w", BitRange(fixed=4))
    assert "bits=4, alpha=not calibrated" in repr(frozen)
    weight = torch.randn(2)
    assert frozen.right_inverse(weight) is weight
    assert InputQuantizer("i", LEARNED, grid_choice="signed").grid_choice == "signed"
