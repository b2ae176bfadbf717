"""What the Triton kernels have in common but for the elements: bit-width, boundaries, and the parameters' gradients.

All of it is computed in every program from the parameters' memory, so that nothing has to run before.
"""

from __future__ import annotations

from nipq.kernels.triton_device import halves_of, jit, mixed, rounded, sum_of, tl

#: Numbers of the grids.
KINDS = {"signed": 0, "unsigned": 1, "shifted": 2}


@jit
def sigmoid(raw: tl.tensor) -> tl.tensor:
    """Of a number in float64."""
    return 1.0 / (1.0 + tl.exp(-raw))


@jit
def softplus(raw: tl.tensor) -> tl.tensor:
    """log(1 + t) with t = e^raw, in float64; t log(u) / (u - 1) with u = 1 + t rounded loses no digit of a small t."""
    t = tl.exp(tl.minimum(raw, 20.0))
    u = 1.0 + t
    beyond = tl.where(u == 1.0, 1.0, u - 1.0)
    near = tl.where(u == 1.0, t, t * (tl.log(u) / beyond))
    return tl.where(raw > 20.0, raw, near)


@jit
def bits_of(
    bit_raw: tl.tensor, bits_frozen: tl.tensor, bits: tl.tensor, key: tl.tensor,
    least: tl.constexpr, most: tl.constexpr, choices: tl.constexpr, stochastic: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The whole bit-width, float32, from whichever form it is given in."""
    if bits is not None:
        whole = tl.load(bits)
    elif bits_frozen is not None:
        whole = tl.load(bits_frozen).to(tl.float32)
    else:
        soft = (least + (most - least) * sigmoid(tl.load(bit_raw).to(tl.float64))).to(tl.float32)
        whole = soft * 0.0 + choices[0]
        if len(choices) > 1:
            upper = soft * 0.0 + choices[1]
            for i in tl.static_range(2, len(choices)):  # the two around it; beyond the ends the two at that end
                beyond = soft >= upper
                whole = tl.where(beyond, upper, whole)
                upper = tl.where(beyond, choices[i] * 1.0, upper)
            if stochastic:
                low, high = halves_of(key)
                draw = (mixed(low * 0 + 0xFFFFFFFF, low, high) >> 8).to(tl.float32) * (1.0 / (1 << 24))
                up = draw < tl.div_rn(soft - whole, upper - whole)
            else:
                up = soft - whole > upper - soft
            whole = tl.where(up, upper, whole)
    return whole


@jit
def power_of_two(whole: tl.tensor) -> tl.tensor:
    """2 to a whole number, exactly."""
    return ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@jit
def range_of(
    channel: tl.tensor, channels: tl.tensor, alpha: tl.tensor, alpha_raw: tl.tensor, bits: tl.tensor, shift: tl.tensor,
    kind: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Step, lower and upper end, zero point, n and boundary of channels, float32; alpha is given, or its parameter."""
    if alpha is not None:
        end = tl.load(alpha + channel, mask=channel < channels, other=1)
    else:
        raw = tl.load(alpha_raw + channel, mask=channel < channels, other=1)
        end = softplus(raw.to(tl.float64)).to(tl.float32)
    n = power_of_two(bits - 1) - 1 if kind == 0 else power_of_two(bits) - 1
    n = end * 0.0 + n
    step = tl.div_rn(end, n)
    zero, lower, upper = end * 0.0, end * 0.0, end
    if kind == 0:
        lower = -end
    elif kind == 2:
        zero = rounded(tl.minimum(tl.div_rn(zero + shift, step), n))
        lower = -(zero * step)
        upper = end - zero * step
    return step, lower, upper, zero, n, end


@jit
def finish_kernel(
    sums: tl.tensor, d_alpha: tl.tensor, d_bits: tl.tensor, channels: tl.tensor, chunks: tl.tensor,
    alpha: tl.tensor, alpha_raw: tl.tensor, bit_raw: tl.tensor, bits_frozen: tl.tensor, bits: tl.tensor,
    shift: tl.tensor, key: tl.tensor,
    least: tl.constexpr, most: tl.constexpr, choices: tl.constexpr, stochastic: tl.constexpr, kind: tl.constexpr,
    tile_channels: tl.constexpr, tile_chunks: tl.constexpr,
) -> None:  # fmt: skip
    """From the sums to the gradients of boundaries and bits, or of the parameters behind them; one program.

    The step is alpha / n; the ends are -alpha and alpha, 0 and alpha, or -zero step and alpha - zero step, where zero
    counts as constant.
    """
    whole = bits_of(bit_raw, bits_frozen, bits, key, least, most, choices, stochastic)
    moved_bits = tl.zeros([tile_channels], tl.float64)
    for first in range(0, channels, tile_channels):
        channel = first + tl.arange(0, tile_channels)
        slope = sum_of(sums, 0, channel, channels, chunks, tile_channels, tile_chunks)
        lower = sum_of(sums, 1, channel, channels, chunks, tile_channels, tile_chunks)
        upper = sum_of(sums, 2, channel, channels, chunks, tile_channels, tile_chunks)
        _, _, _, zero, n, end = range_of(channel, channels, alpha, alpha_raw, whole, shift, kind)
        n = n.to(tl.float64)
        moved = slope - zero.to(tl.float64) * (lower + upper)
        at_end = moved / n + upper
        if kind == 0:
            at_end -= lower
        if alpha is None:
            at_end *= sigmoid(tl.load(alpha_raw + channel, mask=channel < channels, other=0).to(tl.float64))
        tl.store(d_alpha + channel, at_end.to(tl.float32), mask=channel < channels)
        ln_2 = 0.6931471805599453
        moved_bits -= moved * end.to(tl.float64) * (n + 1.0) * ln_2 / (n * n)
    if d_bits is not None:
        found = tl.sum(moved_bits, 0)
        if bit_raw is not None:
            share = sigmoid(tl.load(bit_raw).to(tl.float64))
            found *= (most - least) * share * (1.0 - share)
        tl.store(d_bits, found.to(tl.float32))
