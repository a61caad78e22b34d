"""The next token of each row: temperature, min_p, top_k, top_p, and a draw, without a sort.

A program takes one row. How far a token lies below the likeliest, after temperature, is a float of at least
0, whose bits are ordered as its values are; so the token that is just kept is found by bisecting over 31
bits, a pass over the row each. Masses are sums of 40-bit fixed-point weights: integers, whose sums depend
on no order, so that a row's token depends on nothing but its own logits and settings. The draw inverts the
cumulative distribution in token id order with the integer random number of `random_numbers`.

It draws what `baton.engine.sampler` draws, but where the two's exponentials differ by their last bits at
the very place of the draw. Of equals the lowest ids are kept; NaN counts as the least likely.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.gpu.random_numbers import uniform_bits

_TILE = 4096


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row's token is chosen: one number a row, on the logits' device.

    lines: int64 `[n]`, the line of its logits. temperatures: float32, 0: the likeliest. top_k: int32, 0: off.
    top_p: float64, 1: off. min_p: float32, 0: off. seeds: int64, the bits of an unsigned seed.
    positions: int64, index that the token will have in prompt + output.
    """

    lines: Tensor
    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


def sample_tokens(logits: Tensor, rows: SamplingRows, output: Tensor | None = None) -> Tensor:
    """One token id a row, int64 `[n]`, into `output` if that is given; nothing waits for the device.

    logits: `[lines, V]`, any float dtype, V contiguous, V below 2^17 times 64; left unchanged.
    """
    num_rows, vocab_size = rows.lines.shape[0], logits.shape[-1]
    if output is None:
        output = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    depths = rows.min_p.log().abs_()  # how far below the likeliest a token may lie; infinite: any
    tile = min(_TILE, triton.next_power_of_2(vocab_size))
    _sample[(num_rows,)](
        logits, rows.lines, rows.temperatures, rows.top_k, rows.top_p, depths, rows.seeds, rows.positions,
        output, logits.stride(0), vocab_size, TILE=tile, num_warps=16 if tile == _TILE else 4,
    )  # fmt: skip
    return output


# Columns of one copy from the host, wherever they lie in it.
@triton.jit(
    do_not_specialize_on_alignment=[
        "lines",
        "temperatures",
        "top_ks",
        "top_ps",
        "depths",
        "seeds",
        "positions",
    ]
)
def _sample(
    logits, lines, temperatures, top_ks, top_ps, depths, seeds, positions, output, stride, size,
    TILE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    index = tl.program_id(0)
    line = logits + tl.load(lines + index) * stride
    greatest, token = _likeliest(line, size, TILE)
    temperature = tl.load(temperatures + index)
    if temperature > 0.0:
        bound = tl.load(depths + index).to(tl.int32, bitcast=True)
        num_equals = _count(line, size, greatest, temperature, bound, TILE)
        num_below = _count(line, size, greatest, temperature, bound - 1, TILE)
        top_k = tl.load(top_ks + index)
        if (top_k > 0) & (top_k < num_equals):
            bound = _kth(line, size, greatest, temperature, bound, top_k, TILE)
            num_below = _count(line, size, greatest, temperature, bound - 1, TILE)
            num_equals = top_k
        num_equals = num_equals - num_below
        mass_below = _mass(line, size, greatest, temperature, bound - 1, TILE)
        total = mass_below + num_equals * _weight(bound)
        top_p = tl.load(top_ps + index)
        if top_p < 1.0:
            target = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
            if target > mass_below:
                # The nucleus ends among the tokens at the bound.
                num_equals = tl.minimum(num_equals, _how_many(target - mass_below, bound))
            else:
                bound = _reaching(line, size, greatest, temperature, bound, target, TILE)
                mass_below = _mass(line, size, greatest, temperature, bound - 1, TILE)
                num_equals = _how_many(target - mass_below, bound)
            total = mass_below + num_equals * _weight(bound)
        bits = uniform_bits(tl.load(seeds + index), tl.load(positions + index))
        threshold = tl.umulhi(bits, total.to(tl.uint64)).to(tl.int64)
        token = _token_at(line, size, greatest, temperature, bound, num_equals, threshold, TILE)
    tl.store(output + index, token.to(tl.int64))


@triton.jit
def _finite(values, is_there):
    """float32 without NaN or infinities, and minus infinity where nothing is there."""
    values = values.to(tl.float32)
    most = 3.4028234663852886e38
    values = tl.where(values == values, values, -most)
    values = tl.minimum(tl.maximum(values, -most), most)
    return tl.where(is_there, values, float("-inf"))


@triton.jit
def _likeliest(line, size, TILE: tl.constexpr):  # noqa: N803
    """(greatest logit, lowest id of those that have it)"""
    greatest = tl.full([TILE], float("-inf"), tl.float32)
    tokens = tl.zeros([TILE], tl.int32)
    for first in range(0, size, TILE):
        columns = first + tl.arange(0, TILE)
        is_there = columns < size
        values = _finite(tl.load(line + columns, mask=is_there, other=0.0), is_there)
        tokens = tl.where(values > greatest, columns, tokens)
        greatest = tl.maximum(greatest, values)
    most = tl.max(greatest, 0)
    return most, tl.min(tl.where(greatest == most, tokens, size), 0)


@triton.jit
def _depths(line, columns, size, greatest, temperature):
    """How far tokens lie below the likeliest, as int32 bits of float32; above all others outside the row."""
    is_there = columns < size
    values = _finite(tl.load(line + columns, mask=is_there, other=0.0), is_there)
    depths = tl.div_rn(greatest - values, temperature).to(tl.int32, bitcast=True)
    return tl.where(is_there, depths, 0x7FFFFFFF)


@triton.jit
def _weight(depths):
    """exp(-depth), 40 bits after the binary point: a row of 2^23 fits in 63."""
    return (tl.exp(-depths.to(tl.float32, bitcast=True)) * 1099511627776.0).to(tl.int64)


@triton.jit
def _count(line, size, greatest, temperature, bound, TILE: tl.constexpr):  # noqa: N803
    """Tokens that lie no deeper than `bound`, int32."""
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, size, TILE):
        depths = _depths(line, first + tl.arange(0, TILE), size, greatest, temperature)
        count += (depths <= bound).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mass(line, size, greatest, temperature, bound, TILE: tl.constexpr):  # noqa: N803
    """Weight of the tokens that lie no deeper than `bound`, int64."""
    mass = tl.zeros([TILE], tl.int64)
    for first in range(0, size, TILE):
        depths = _depths(line, first + tl.arange(0, TILE), size, greatest, temperature)
        mass += tl.where(depths <= bound, _weight(depths), 0)
    return tl.sum(mass, 0)


@triton.jit
def _kth(line, size, greatest, temperature, bound, top_k, TILE: tl.constexpr):  # noqa: N803
    """The least depth, at most `bound`, that at least `top_k` tokens have reached."""
    low = tl.full([], 0, tl.int32)
    high = bound
    while low < high:
        middle = low + (high - low) // 2
        count = _count(line, size, greatest, temperature, middle, TILE)
        low = tl.where(count < top_k, middle + 1, low)
        high = tl.where(count < top_k, high, middle)
        # Just as many: any depth between theirs and the next one's does.
        low = tl.where(count == top_k, middle, low)
    return low


@triton.jit
def _reaching(line, size, greatest, temperature, bound, target, TILE: tl.constexpr):  # noqa: N803
    """The least depth, below `bound`, down to which the tokens weigh at least `target`; those below it do.

    Halves what is left between depths that tokens have: each look at all of them costs tens of microseconds.
    """
    low = tl.full([], 0, tl.int32)
    high = bound - 1
    while low < high:
        middle = low + (high - low) // 2
        mass, below, above = _mass_around(line, size, greatest, temperature, middle, TILE)
        low = tl.where(mass < target, above, low)
        high = tl.where(mass < target, high, below)
    return low


@triton.jit
def _mass_around(line, size, greatest, temperature, bound, TILE: tl.constexpr):  # noqa: N803
    """`_mass`, and the tokens' own depths next to `bound`: the last to it, the first below it."""
    mass = tl.zeros([TILE], tl.int64)
    last = tl.zeros([TILE], tl.int32)
    first_below = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    for first in range(0, size, TILE):
        depths = _depths(line, first + tl.arange(0, TILE), size, greatest, temperature)
        is_in = depths <= bound
        mass += tl.where(is_in, _weight(depths), 0)
        last = tl.maximum(last, tl.where(is_in, depths, 0))
        first_below = tl.minimum(first_below, tl.where(is_in, 0x7FFFFFFF, depths))
    return tl.sum(mass, 0), tl.max(last, 0), tl.min(first_below, 0)


@triton.jit
def _how_many(mass, depth):
    """How many tokens of this depth weigh at least `mass`, int32."""
    weight = tl.maximum(_weight(depth), 1)
    return tl.minimum((mass + weight - 1) // weight, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _token_at(
    line, size, greatest, temperature, bound, num_equals, threshold, TILE: tl.constexpr  # noqa: N803
):  # fmt: skip
    """The first token whose cumulative weight, of those kept, is above `threshold`, int32."""
    mass = tl.full([], 0, tl.int64)
    num_seen = tl.full([], 0, tl.int32)
    token = size
    for first in range(0, size, TILE):
        columns = first + tl.arange(0, TILE)
        depths = _depths(line, columns, size, greatest, temperature)
        is_equal = (depths == bound).to(tl.int32)
        is_kept = (depths < bound) | ((is_equal > 0) & (num_seen + tl.cumsum(is_equal, 0) <= num_equals))
        weights = tl.where(is_kept, _weight(depths), 0)
        is_past = mass + tl.cumsum(weights, 0) > threshold
        token = tl.minimum(token, tl.min(tl.where(is_past, columns, size), 0))
        num_seen += tl.sum(is_equal, 0)
        mass += tl.sum(weights, 0)
    return token
