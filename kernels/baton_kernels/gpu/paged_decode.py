"""Attention of one-token rows over their pages, the context split among programs.

A row's one query leaves most of a GPU idle when one program reads its whole context, so the context is split,
each split gives its own softmax, and a second kernel combines them (Flash-Decoding, Dao et al., 2023; the
softmax is the online one of Milakov and Gimelshein, 2018). The query heads that share a kv head are the rows
of one matrix product, so each page is read once for all of them.

Nothing here depends on values on the host: the grid follows from shapes and `num_splits`, context lengths are
read on the device, and programs that have nothing to do end at once. So a CUDA graph of it replays for any
lengths. Letters in shapes as in `baton_kernels.reference`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.gpu.matrix_product import add_product

_TOKENS_PER_TILE = 64
_MAX_SPLITS = 64
_PROGRAMS_PER_MULTIPROCESSOR = 8  # enough waves that the last, partly filled one costs little
_LOG2_E = math.log2(math.e)


def splits_for(num_rows: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """How many ways to split contexts, at most: a power of two, at least 1.

    Whatever the contexts' lengths are, as sums depend on it to the last bit, and a graph, which is captured
    for the longest, is to give what an eager step gives. A context of few tiles leaves the last splits empty.
    """
    wanted = min(_PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // (num_rows * num_kv_heads), _MAX_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def attend_one_token_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    num_splits: int,
    window: int | None = None,
    soft_cap: float | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    output: Tensor | None = None,
) -> Tensor:
    """Attention of rows whose one query is their last token, accumulated in float32.

    query: `[R, H, D]`, D contiguous. key, value: one layer of the pool, `[N, K, P, D]` with any strides but
    D's, in query's dtype or float8_e4m3fn. block_tables: int32 `[R, B]`, page of every P positions.
    context_lens: int32 `[R]`, tokens that the row attends to, its own included; at least 1. num_splits: what
    `splits_for` gave. window: a query sees this many last tokens, itself included. soft_cap: scores become
    `soft_cap * tanh(score / soft_cap)` (Gemma 2). scales: what float8 K and V are to be multiplied by.
    Returns `[R, H, D]` in query's dtype, which is `output` if that is given.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key.shape[1:3]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if output is None else output
    partial, log_sums = output, output  # not touched where nothing is split
    if num_splits > 1:
        shape = (num_rows, num_heads, num_splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    head_dim_padded = max(16, triton.next_power_of_2(head_dim))
    scale, cap = folded_scale(head_dim, soft_cap)
    _attend_split[(num_rows, num_kv_heads, num_splits)](
        query, key, value, block_tables, context_lens, output, partial, log_sums,
        scale * scales[0], cap, scales[1], window or 0,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1), block_tables.stride(0),
        key.stride(0), key.stride(1), key.stride(2),
        GROUP=group, GROUP_PADDED=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=head_dim_padded, BLOCK_SIZE=block_size,
        TILE=_TOKENS_PER_TILE, NUM_SPLITS=num_splits,
        HAS_WINDOW=window is not None, HAS_SOFT_CAP=soft_cap is not None,
        num_warps=4, num_stages=5 if query.element_size() == 2 else 2,
    )  # fmt: skip
    if num_splits > 1:
        _combine_splits[(num_rows, num_heads)](
            partial, log_sums, context_lens, output, window or 0, output.stride(0), output.stride(1),
            HEAD_DIM=head_dim, HEAD_DIM_PADDED=head_dim_padded, TILE=_TOKENS_PER_TILE, NUM_SPLITS=num_splits,
            HAS_WINDOW=window is not None, num_warps=4,
        )  # fmt: skip
    return output


def folded_scale(head_dim: int, soft_cap: float | None) -> tuple[float, float]:
    """(factor of the scores, factor of their tanh, if any) whose result is an exponent of 2, not of e."""
    if soft_cap is None:
        return head_dim**-0.5 * _LOG2_E, 0.0
    return head_dim**-0.5 / soft_cap, soft_cap * _LOG2_E


@triton.jit
def tanh(x):
    """Hyperbolic tangent; Triton's own is a library call that its interpreter does not have."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _tokens_per_split(num_visible, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr):  # noqa: N803
    """Whole tiles, so that only the last split has a masked one."""
    return tl.cdiv(tl.cdiv(num_visible, NUM_SPLITS), TILE) * TILE


# What changes from step to step must not make Triton compile a variant in the middle of serving.
@triton.jit(do_not_specialize=["table_stride"])
def _attend_split(
    query, key, value, block_tables, context_lens, output, partial, log_sums,
    scale, soft_cap, value_scale, window,
    query_row_stride, query_head_stride, output_row_stride, output_head_stride, table_stride,
    page_stride, head_stride, slot_stride,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,  # noqa: N803
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + row)
    first_visible = 0
    if HAS_WINDOW:
        first_visible = tl.maximum(context_len - window, 0)
    split_len = _tokens_per_split(context_len - first_visible, TILE, NUM_SPLITS)
    start = first_visible + split * split_len
    end = tl.minimum(start + split_len, context_len)
    if start >= end:
        return
    heads = kv_head * GROUP + tl.arange(0, GROUP_PADDED)
    is_head = tl.arange(0, GROUP_PADDED) < GROUP
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dims < HEAD_DIM
    is_query = is_head[:, None] & is_dim[None, :]
    queries = tl.load(
        query + row * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
        mask=is_query, other=0.0,
    )  # fmt: skip
    greatest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    weighted = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    table = block_tables + row * table_stride
    for first in range(start, end, TILE):
        tokens = first + tl.arange(0, TILE)
        is_token = tokens < end
        pages = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        places = pages * page_stride + kv_head * head_stride + (tokens % BLOCK_SIZE) * slot_stride
        # Masked, not only weighted 0: an unwritten slot may hold NaN, and 0 * NaN is NaN.
        is_there = is_token[:, None] & is_dim[None, :]
        keys = tl.load(key + places[:, None] + dims[None, :], mask=is_there, other=0.0).to(queries.dtype)
        scores = add_product(queries, tl.trans(keys), tl.zeros([GROUP_PADDED, TILE], tl.float32)) * scale
        if HAS_SOFT_CAP:
            scores = soft_cap * tanh(scores)
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        new_greatest = tl.maximum(greatest, tl.max(scores, 1))
        shrink = tl.exp2(greatest - new_greatest)
        weights = tl.exp2(scores - new_greatest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(value + places[:, None] + dims[None, :], mask=is_there, other=0.0).to(queries.dtype)
        weighted = weighted * shrink[:, None]
        weighted = add_product(weights.to(values.dtype), values, weighted)
        greatest = new_greatest
    result = weighted / total[:, None] * value_scale
    if NUM_SPLITS == 1:
        places = output + row * output_row_stride + heads[:, None] * output_head_stride + dims[None, :]
        tl.store(places, result.to(output.dtype.element_ty), mask=is_query)
    else:
        lines = ((row * tl.num_programs(1) * GROUP + heads) * NUM_SPLITS + split).to(tl.int64)
        tl.store(partial + lines[:, None] * HEAD_DIM + dims[None, :], result, mask=is_query)
        tl.store(log_sums + lines, greatest + tl.log2(total), mask=is_head)


@triton.jit
def _combine_splits(
    partial, log_sums, context_lens, output, window, output_row_stride, output_head_stride,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, HAS_WINDOW: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    num_visible = tl.load(context_lens + row)
    if HAS_WINDOW:
        num_visible = tl.minimum(num_visible, window)
    splits = tl.arange(0, NUM_SPLITS)
    is_split = splits * _tokens_per_split(num_visible, TILE, NUM_SPLITS) < num_visible
    lines = ((row * tl.num_programs(1) + head) * NUM_SPLITS + splits).to(tl.int64)
    logs = tl.load(log_sums + lines, mask=is_split, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dims < HEAD_DIM
    parts = tl.load(
        partial + lines[:, None] * HEAD_DIM + dims[None, :],
        mask=is_split[:, None] & is_dim[None, :], other=0.0,
    )  # fmt: skip
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    places = output + row * output_row_stride + head * output_head_stride + dims
    tl.store(places, result.to(output.dtype.element_ty), mask=is_dim)
