"""Whole pages, or some layers of them, between the pool and contiguous staging.

A page's layers are contiguous in the pool, so a piece is one straight copy; a launch takes all pages of a
transfer, where one copy each would cost a launch each. Letters in shapes as in `baton_kernels.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # values a program


def gather_blocks(
    pool: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, staging: Tensor | None = None
) -> Tensor:
    """Copy layers first_layer .. first_layer + num_layers of some pages out of the pool.

    pool: `[N, L, 2, K, P, D]`, contiguous; block_ids: int64 `[n]`. Returns `[n, num_layers, 2, K, P, D]`,
    contiguous, which is `staging` if that is given.
    """
    shape = (block_ids.shape[0], num_layers, *pool.shape[2:])
    staging = torch.empty(shape, dtype=pool.dtype, device=pool.device) if staging is None else staging
    _copy(pool, staging, block_ids, first_layer, num_layers, into_pool=False)
    return staging


def scatter_blocks(staging: Tensor, pool: Tensor, block_ids: Tensor, first_layer: int) -> None:
    """Copy `[n, num_layers, 2, K, P, D]` into those layers of pages block_ids, int64 `[n]`, all different."""
    _copy(pool, staging, block_ids, first_layer, staging.shape[1], into_pool=True)


def _copy(
    pool: Tensor, staging: Tensor, block_ids: Tensor, first_layer: int, num_layers: int, into_pool: bool
) -> None:
    layer_size = pool.stride(1)
    piece = num_layers * layer_size
    _copy_pieces[(block_ids.shape[0], triton.cdiv(piece, _TILE))](
        pool, staging, block_ids, pool.stride(0), first_layer * layer_size, piece,
        TILE=_TILE, INTO_POOL=into_pool, num_warps=8,
    )  # fmt: skip


@triton.jit
def _copy_pieces(
    pool, staging, block_ids, block_stride, offset, piece,
    TILE: tl.constexpr, INTO_POOL: tl.constexpr,  # noqa: N803
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_there = columns < piece
    in_pool = pool + tl.load(block_ids + index) * block_stride + offset + columns
    staged = staging + index * piece + columns
    if INTO_POOL:
        tl.store(in_pool, tl.load(staged, mask=is_there), mask=is_there)
    else:
        tl.store(staged, tl.load(in_pool, mask=is_there), mask=is_there)
