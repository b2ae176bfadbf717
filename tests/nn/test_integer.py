"""The arithmetic on whole codes is exact, and the batch norm is folded into it without loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from nipq.nn.integer import bias_of, fold, integer_forward, needs_float64
from nipq.nn.kinds import channel_dim, output_channels, weight_channel_axis


def random_batchnorm(channels: int, *, affine: bool = True) -> nn.BatchNorm2d:
    batchnorm = nn.BatchNorm2d(channels, affine=affine).eval()
    batchnorm.running_mean.normal_()
    batchnorm.running_var.uniform_(0.1, 3)
    if affine:
        nn.init.normal_(batchnorm.weight)  # both signs
        nn.init.normal_(batchnorm.bias)
    return batchnorm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_gives_what_the_batch_norm_makes_of_the_sums(affine: bool, with_bias: bool) -> None:
    """Closed form in float64: bn(sum * step_x * step_w + bias); scale and offset are that rounded to float32 once."""
    sums = torch.randint(-500, 500, (2, 5, 3, 3)).double()
    step_x, step_w = torch.rand(1) + 0.1, torch.rand(5) + 0.1
    bias = torch.randn(5) if with_bias else None
    batchnorm = random_batchnorm(5, affine=affine)
    scale, offset = fold(step_x, step_w, bias, batchnorm, 5)
    assert scale.dtype == offset.dtype == torch.float32
    layer = sums * (step_x.double() * step_w.double()).reshape(-1, 1, 1)
    if bias is not None:
        layer = layer + bias.double().reshape(-1, 1, 1)
    expected = batchnorm.double()(layer)
    found = sums * scale.double().reshape(-1, 1, 1) + offset.double().reshape(-1, 1, 1)
    # Each of the two numbers is off by at most half a unit in the last of 24 bits.
    bound = 2**-24 * ((sums * scale.reshape(-1, 1, 1)).abs() + offset.abs().reshape(-1, 1, 1)) + 1e-12
    assert bool(((found - expected).abs() <= bound).all())


def test_a_negative_gamma_gives_a_negative_scale() -> None:
    batchnorm = random_batchnorm(1)
    nn.init.constant_(batchnorm.weight, -1.0)
    assert float(fold(torch.ones(1), torch.ones(1), None, batchnorm, 1)[0]) < 0


def test_without_a_batch_norm_scale_is_the_product_of_the_steps_and_offset_the_bias() -> None:
    scale, offset = fold(torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([1.0, 2.0]), None, 2)
    assert scale.tolist() == [0.125, 0.125]
    assert offset.tolist() == [1.0, 2.0]
    assert fold(torch.tensor([0.5]), torch.tensor([0.25]), None, None, 2)[1].tolist() == [0.0, 0.0]


def test_float64_is_asked_for_where_a_sum_may_reach_2_to_the_24() -> None:
    weight = torch.full((1, 2**15), 2, dtype=torch.int8)  # sum of magnitudes 2^16
    assert needs_float64(weight, 0, 256)
    assert not needs_float64(weight, 0, 255)
    assert needs_float64(weight, -256, 1), "the lowest code counts as well"


def test_float64_is_asked_for_where_reduced_precision_would_round_a_code() -> None:
    """257 takes 9 bits, and bfloat16 has 8."""
    small = torch.ones(1, 1)
    assert float(torch.tensor(257.0).bfloat16()) != 257
    assert needs_float64(small, 0, 257)
    assert needs_float64(257 * small, 0, 1)
    assert not needs_float64(256 * small, 0, 256)


def test_sums_of_one_output_channel_count_not_those_of_all() -> None:
    weight = torch.full((2**10, 10), 100)
    assert not needs_float64(weight, 0, 255)
    assert needs_float64(weight.repeat(1, 100), 0, 255)
    transposed = torch.full((10, 2**10, 1, 1), 100)
    assert needs_float64(transposed.repeat(100, 1, 1, 1), 0, 255, channel_axis=1)
    assert not needs_float64(transposed, 0, 255, channel_axis=1)


@pytest.mark.parametrize(("largest_x", "largest_w"), [(255, 127), (65535, 32767)])
def test_the_sums_are_exact(largest_x: int, largest_w: int) -> None:
    """Against int64 arithmetic; the second case does not fit float32."""
    codes_x = torch.randint(0, largest_x + 1, (1, 4, 6, 6))
    codes_w = torch.randint(-largest_w, largest_w + 1, (3, 4, 3, 3))
    columns = codes_x.unfold(2, 3, 1).unfold(3, 3, 1)
    exact = torch.einsum("bchwij,ocij->bohw", columns, codes_w)
    float64 = needs_float64(codes_w, 0, largest_x)
    assert float64 is (largest_x > 255)
    one, zero = torch.ones(3), torch.zeros(3)
    found = integer_forward(conv2d, codes_x.float(), codes_w.to(torch.int16), one, zero, -3, float64)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact.float())


def test_what_a_fast_algorithm_adds_below_one_half_is_rounded_away() -> None:
    found = integer_forward(
        lambda x, w: x @ w.T + 0.4,
        torch.tensor([[2.0, 3.0]]),
        torch.tensor([[1, -1]], dtype=torch.int8),
        torch.tensor([0.5]),
        torch.tensor([1.0]),
        -1,
        False,
    )
    assert found.tolist() == [[0.5]]


def test_autocast_does_not_reach_the_sums() -> None:
    x, w = torch.tensor([[255.0, 255.0]]), torch.tensor([[127, 126]], dtype=torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = integer_forward(lambda a, b: a @ b.T, x, w, torch.ones(1), torch.zeros(1), -1, False)
    assert found.tolist() == [[255 * 253]]


@pytest.mark.parametrize(
    ("layer", "dim", "channels", "axis"),
    [
        (nn.Linear(3, 7), -1, 7, 0),
        (nn.Conv1d(2, 4, 3), -2, 4, 0),
        (nn.Conv3d(2, 4, 3, groups=2), -4, 4, 0),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), -3, 6, 1),
    ],
)
def test_axes_of_layers(layer: nn.Module, dim: int, channels: int, axis: int) -> None:
    assert (channel_dim(layer), output_channels(layer), weight_channel_axis(layer)) == (dim, channels, axis)


def test_the_bias_of_a_layer_is_a_tensor_or_none() -> None:
    layer = nn.Linear(2, 2)
    assert bias_of(layer) is layer.bias
    assert bias_of(nn.Linear(2, 2, bias=False)) is None
