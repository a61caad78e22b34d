"""Rounding to 8-bit floats."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def float8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """See `baton_kernels.quantization.float8_rows`, in one pass over `values`: `[R, C]`, contiguous."""
    num_rows, size = values.shape
    rounded = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=values.device)
    padded = triton.next_power_of_2(size)
    _float8_rows[(num_rows,)](
        values, rounded, scales, SIZE=size, SIZE_PADDED=padded, num_warps=min(16, max(1, padded // 512))
    )
    return rounded, scales


@triton.jit
def _float8_rows(values, rounded, scales, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_PADDED)
    is_there = columns < SIZE
    numbers = tl.load(values + row * SIZE + columns, mask=is_there, other=0.0).to(tl.float32)
    # Divided exactly, as torch does: many quotients of bfloat16 lie right between two numbers of 8 bits.
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(numbers), 0), 1e-30), 448.0)  # FLOAT8_MAX
    tl.store(scales + row, scale)
    bits = as_float8(tl.div_rn(numbers, scale))
    tl.store(rounded + row * SIZE + columns, bits.to(rounded.dtype.element_ty, bitcast=True), mask=is_there)


@triton.jit
def as_float8(numbers):
    """Bits of float8_e4m3fn, to the nearest, ties to even; too large becomes the greatest, NaN stays NaN.

    In integers because Triton's interpreter loses the carry where rounding reaches the exponent.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    rest = bits & 0x7FFFFFFF
    # Adding 2^14 rounds to a multiple of 2^-9, the distance of the small ones, which is then the lowest bits.
    small = (rest.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    large = (rest - 0x3C000000 + 0x7FFFF + ((rest >> 20) & 1)) >> 20  # exponents count from 7, not from 127
    code = tl.where(rest < 0x3C800000, small, large)
    code = tl.where(rest >= 0x43E00000, 0x7E, code)
    code = tl.where(rest > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
