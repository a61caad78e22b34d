"""The matrix product of attention kernels."""

import triton
import triton.language as tl

# Triton's interpreter would multiply the bits of bfloat16 as if they were integers.
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def add_product(left, right, total):
    """`total + left @ right`, float32; float32 factors are multiplied as such, not as TF32."""
    if _IS_INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
