"""crc32c (RFC 3720, appendix B.4) of memory on a device, so that pages are checked without leaving it.

A CRC is the remainder of a polynomial over GF(2): the sum (exclusive or) of the message's words, each times
a power of x that depends on its distance from the end alone. So all words are multiplied at once, by powers
from tables, and the order of the sum does not matter. Numbers are bit-reversed as in RFC 3720: bit 31 is x^0.
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

_POLYNOMIAL = 0x82F63B78  # x^32, reduced
_ONE = 1 << 31
_LANES = 256  # words that a program takes at a time
_ROUNDS = 32
_TILE = _LANES * _ROUNDS  # words of one program
_ALL_ONES = 0xFFFFFFFF


def crc32c_remainder(words: Tensor, remainder: Tensor) -> None:
    """Queue the sum of a message's words into `remainder`, which is not waited for: see `crc32c_of`.

    words: int32 `[n]`, contiguous; remainder: int32 `[1]`, on the same device.
    """
    num_words = words.shape[0]
    num_tiles = triton.cdiv(num_words, _TILE)
    remainder.zero_()
    _sum_words[(num_tiles,)](
        words, remainder, _on_device(_TILE, 1, 1, words.device),
        _on_device(_tables_size(num_tiles), _TILE, 0, words.device), num_words,
        LANES=_LANES, ROUNDS=_ROUNDS, num_warps=8,
    )  # fmt: skip


def crc32c_of(remainder: int, num_bytes: int) -> int:
    """The crc32c of a message of `num_bytes`, given what `crc32c_remainder` left as an integer of 32 bits.

    The rest of the definition: the first 32 bits are inverted before, and the remainder after.
    """
    first = _multiply_numbers(_ALL_ONES, _power(2 * num_bytes))
    return (remainder & _ALL_ONES) ^ first ^ _ALL_ONES


def _tables_size(num_tiles: int) -> int:
    """Tables are made for a few sizes, not for every message."""
    return max(64, 1 << (num_tiles - 1).bit_length())


@cache
def _on_device(size: int, step: int, first: int, device: torch.device) -> Tensor:
    """int32 `[size]`: x^(32 * (first + i * step)) for each i."""
    powers = _powers(size, step, first).view(np.int32)
    return torch.from_numpy(powers).to(device)


def _powers(size: int, step: int, first: int) -> NDArray[np.uint32]:
    powers = np.array([_power(8 * first)], dtype=np.uint32)
    while len(powers) < size:  # the second half is the first one times a power
        factor = np.uint32(_power(8 * step * len(powers)))
        powers = np.concatenate((powers, _multiply(powers, np.full_like(powers, factor))))
    return powers[:size]


@cache
def _power(num_nibbles: int) -> int:
    """x^(4 * num_nibbles), by repeated squaring."""
    result, square, exponent = _ONE, _ONE >> 4, num_nibbles
    while exponent:
        if exponent & 1:
            result = _multiply_numbers(result, square)
        square = _multiply_numbers(square, square)
        exponent >>= 1
    return result


def _multiply_numbers(left: int, right: int) -> int:
    return int(_multiply(np.array([left], np.uint32), np.array([right], np.uint32))[0])


def _multiply(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Products of polynomials over GF(2), reduced."""
    product = np.zeros_like(left)
    for bit in range(31, -1, -1):
        product ^= np.where(left >> np.uint32(bit) & np.uint32(1), right, np.uint32(0))
        right = right >> np.uint32(1) ^ (right & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return product


@triton.jit
def _multiply_words(left, right):
    """`_multiply` on uint32."""
    product = right * 0
    for _ in tl.static_range(32):
        product ^= right * (left >> 31)
        left = left << 1
        right = (right >> 1) ^ (right & 1) * 0x82F63B78
    return product


@triton.jit
def _sum_words(
    words, remainder, word_powers, tile_powers, num_words,
    LANES: tl.constexpr, ROUNDS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # Words count from the message's end, so that what is missing in the last tile lies before the first word,
    # where zeros change nothing.
    tile = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), dtype=tl.uint32)
    left = num_words - tile * (LANES * ROUNDS)
    for index in range(tl.minimum(ROUNDS, tl.cdiv(left, LANES))):
        in_tile = index * LANES + lanes
        from_end = tile * (LANES * ROUNDS) + in_tile
        found = tl.load(words + (num_words - 1 - from_end), mask=from_end < num_words, other=0)
        power = tl.load(word_powers + in_tile)
        total ^= _multiply_words(found.to(tl.uint32, bitcast=True), power.to(tl.uint32, bitcast=True))
    mine = tl.xor_sum(total, axis=0)
    weighted = _multiply_words(mine, tl.load(tile_powers + tile).to(tl.uint32, bitcast=True))
    tl.atomic_xor(remainder, weighted.to(tl.int32, bitcast=True))
