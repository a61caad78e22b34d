"""One token's states times a matrix: a decode step of one row, whose time is that of reading the weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.reads import Normalise, Reads, SiluGate

# Each thread keeps 8 columns, one load of 16 bytes, of every row: nothing is exchanged before the last sum.
_ROWS, _MAX_TILE, _COLUMNS_OF_WARP = 4, 1024, 256


def one_row(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reads: Reads | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`[1, OUT]`: `reads(states)` times `weight` transposed, plus `bias` and `residual`, summed in float32.

    states: `[1, IN]`, or `[1, 2 * IN]` for a gate; weight: `[OUT, IN]`; bias: `[OUT]`; residual: `[1, OUT]`,
    is overwritten with the sum and returned. All are contiguous.
    """
    num_outputs, size = weight.shape
    output = residual
    if output is None:
        output = torch.empty(1, num_outputs, dtype=states.dtype, device=states.device)
    norm = reads if isinstance(reads, Normalise) else None
    tile = min(_MAX_TILE, triton.next_power_of_2(size))
    _one_row[(triton.cdiv(num_outputs, _ROWS),)](
        states, weight, states if norm is None else norm.weight, states if bias is None else bias, output,
        0.0 if norm is None else norm.eps, num_outputs,
        SIZE=size, ROWS=_ROWS, TILE=tile, HAS_NORM=norm is not None, IS_GATED=isinstance(reads, SiluGate),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        num_warps=max(1, tile // _COLUMNS_OF_WARP),
    )  # fmt: skip
    return output


@triton.jit
def _one_row(
    states, weight, norm_weight, bias, output, eps, num_outputs,
    SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,  # noqa: N803
    HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,  # noqa: N803
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_outputs
    lines = weight + tl.where(is_row, rows, 0).to(tl.int64)[:, None] * SIZE
    total = tl.zeros([ROWS, TILE], tl.float32)
    squares = tl.zeros([TILE], tl.float32)
    for first in range(0, SIZE, TILE):
        columns = first + tl.arange(0, TILE)
        is_there = columns < SIZE
        # No other program reads them, unlike the states, which are to stay in the caches.
        weights = tl.load(
            lines + columns[None, :], mask=is_there[None, :], other=0.0, eviction_policy="evict_first"
        )
        values = tl.load(states + columns, mask=is_there, other=0.0).to(tl.float32)
        if IS_GATED:
            up = tl.load(states + SIZE + columns, mask=is_there, other=0.0).to(tl.float32)
            values = values * tl.sigmoid(values) * up
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm_weight + columns, mask=is_there, other=0.0).to(tl.float32)
        total += weights.to(tl.float32) * values[None, :]
    sums = tl.sum(total, 1)
    if HAS_NORM:
        sums *= tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
    if HAS_BIAS:
        sums += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        sums += tl.load(output + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + rows, sums.to(output.dtype.element_ty), mask=is_row)
