"""Causal attention of longer rows over their cached prefix and themselves, both read from pages.

Tiled, with the online softmax (FlashAttention-2, Dao, 2023). A program computes one tile of one row's tokens
for one head; tiles of keys that every query of it sees need no mask and are taken first. Rows of all lengths
go in one launch: programs beyond a row's end stop at once. Letters in shapes as in `baton_kernels.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.gpu.matrix_product import add_product
from baton_kernels.gpu.paged_decode import folded_scale, tanh


def attend_long_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    row_bounds: Tensor,
    max_row_len: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    output: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows of any number of tokens, accumulated in float32.

    query: `[T, H, D]`, D contiguous; row r is tokens row_bounds[r] .. row_bounds[r + 1], the last ones of its
    context. key, value: one layer of the pool, `[N, K, P, D]` with any strides but D's, in query's dtype
    or float8_e4m3fn, the rows' own tokens stored already. block_tables: int32 `[R, B]`. context_lens: int32
    `[R]`. row_bounds: int32 `[R + 1]`. max_row_len: tokens of the longest row. window, soft_cap, scales: as
    in `paged_decode`. Returns `[T, H, D]` in query's dtype, which is `output` if that is given.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = key.shape[1:3]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if output is None else output
    scale, cap = folded_scale(head_dim, soft_cap)
    head_dim_padded = max(16, triton.next_power_of_2(head_dim))
    query_tile, key_tile, num_warps, num_stages = _tiles(query.element_size(), head_dim_padded)
    grid = (triton.cdiv(max_row_len, query_tile), num_heads, context_lens.shape[0])
    _attend_tile[grid](
        query, key, value, block_tables, context_lens, row_bounds, output,
        scale * scales[0], cap, scales[1], window or 0,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1), block_tables.stride(0),
        key.stride(0), key.stride(1), key.stride(2),
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, HEAD_DIM_PADDED=head_dim_padded,
        BLOCK_SIZE=block_size, QUERY_TILE=query_tile, KEY_TILE=key_tile,
        HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return output


def _tiles(bytes_per_value: int, head_dim: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages): what fits in a Hopper's shared memory and registers."""
    if bytes_per_value == 2 and head_dim <= 128:
        return 128, 64, 8, 3
    return (64, 32, 4, 2) if bytes_per_value == 2 else (32, 16, 4, 1)


# Rows begin and tables end where a step wants it: no reason to compile a variant in the middle of serving.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_tables", "context_lens", "row_bounds"],
)
def _attend_tile(
    query, key, value, block_tables, context_lens, row_bounds, output,
    scale, soft_cap, value_scale, window,
    query_token_stride, query_head_stride, output_token_stride, output_head_stride, table_stride,
    page_stride, head_stride, slot_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,  # noqa: N803
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # The last tile sees the most keys, so it goes first and the short ones fill up the end.
    tile, head, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(row_bounds + row), tl.load(row_bounds + row + 1)
    first_token = row_start + tile * QUERY_TILE
    if first_token >= row_end:
        return
    context_len = tl.load(context_lens + row)
    first_position = context_len - row_end + first_token
    tokens = first_token + tl.arange(0, QUERY_TILE)
    positions = first_position + tl.arange(0, QUERY_TILE)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_query = (tokens < row_end)[:, None] & (dims < HEAD_DIM)[None, :]
    long_tokens = tokens.to(tl.int64)[:, None]
    queries = tl.load(
        query + long_tokens * query_token_stride + head * query_head_stride + dims[None, :],
        mask=is_query, other=0.0,
    )  # fmt: skip
    greatest = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    weighted = tl.zeros([QUERY_TILE, HEAD_DIM_PADDED], tl.float32)
    table = block_tables + row * table_stride
    key += (head // GROUP) * head_stride
    value += (head // GROUP) * head_stride
    end = tl.minimum(first_position + QUERY_TILE, context_len)
    if HAS_WINDOW:
        # Both ends of what a query sees then lie in some tile; all tiles are masked rather than three loops.
        masked_from = tl.maximum(first_position - window + 1, 0) // KEY_TILE * KEY_TILE
    else:
        masked_from = (first_position + 1) // KEY_TILE * KEY_TILE
        greatest, total, weighted = _add_keys(
            greatest, total, weighted, queries, positions, key, value, table, 0, masked_from, end,
            scale, soft_cap, window, page_stride, slot_stride,
            HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, KEY_TILE, False, HAS_WINDOW, HAS_SOFT_CAP,
        )  # fmt: skip
    greatest, total, weighted = _add_keys(
        greatest, total, weighted, queries, positions, key, value, table, masked_from, end, end,
        scale, soft_cap, window, page_stride, slot_stride,
        HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, KEY_TILE, True, HAS_WINDOW, HAS_SOFT_CAP,
    )  # fmt: skip
    places = output + long_tokens * output_token_stride + head * output_head_stride + dims[None, :]
    tl.store(places, (weighted / total[:, None] * value_scale).to(output.dtype.element_ty), mask=is_query)


@triton.jit
def _add_keys(
    greatest, total, weighted, queries, positions, key, value, table, start, stop, context_end,
    scale, soft_cap, window, page_stride, slot_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # noqa: N803
    KEY_TILE: tl.constexpr, IS_MASKED: tl.constexpr,  # noqa: N803
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Take the keys at positions start .. stop into the running softmax."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    for first in range(start, stop, KEY_TILE):
        slots = first + tl.arange(0, KEY_TILE)
        is_there = (slots < context_end)[:, None] & (dims < HEAD_DIM)[None, :]
        pages = tl.load(table + slots // BLOCK_SIZE, mask=slots < context_end, other=0).to(tl.int64)
        places = (pages * page_stride + (slots % BLOCK_SIZE) * slot_stride)[:, None] + dims[None, :]
        keys = tl.load(key + places, mask=is_there, other=0.0).to(queries.dtype)
        scores = (
            add_product(queries, tl.trans(keys), tl.zeros([positions.shape[0], KEY_TILE], tl.float32)) * scale
        )
        if HAS_SOFT_CAP:
            scores = soft_cap * tanh(scores)
        if IS_MASKED:
            is_seen = (slots[None, :] <= positions[:, None]) & (slots < context_end)[None, :]
            if HAS_WINDOW:
                is_seen = is_seen & (slots[None, :] > positions[:, None] - window)
            scores = tl.where(is_seen, scores, float("-inf"))
        new_greatest = tl.maximum(greatest, tl.max(scores, 1))
        # A query that has seen nothing yet: minus infinity less itself would be NaN.
        pivot = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
        shrink = tl.exp2(greatest - pivot)
        weights = tl.exp2(scores - pivot[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(value + places, mask=is_there, other=0.0).to(queries.dtype)
        weighted = weighted * shrink[:, None]
        weighted = add_product(weights.to(values.dtype), values, weighted)
        greatest = new_greatest
    return greatest, total, weighted
