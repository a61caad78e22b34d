"""The counter-based random numbers of `baton.core.sampling.uniform`, to the bit, with integers alone."""

import triton
import triton.language as tl


@triton.jit
def _mix64(word):
    """splitmix64's output function (Steele, Lea and Flood, 2014)."""
    word = word + 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def uniform_bits(seed, position):
    """The number in [0, 1) of (seed, position) times 2^64, uint64; its lowest 11 bits are 0.

    seed, position: int64, the seed's bits those of the unsigned seed.
    """
    seed = seed.to(tl.uint64, bitcast=True)
    position = position.to(tl.uint64, bitcast=True)
    word = _mix64(_mix64(seed) ^ (position * 0x9E3779B97F4A7C15))
    return word >> 11 << 11
