"""Plain torch kernels over the paged KV pool: the oracle that every faster kernel is tested against.

They run on any device. Letters in shape comments:

    N pages   L layers   K kv heads   H query heads, a multiple of K   D head_dim   P slots a page
    T tokens  R rows     B pages of the longest row   S slots = B * P

The pool is contiguous `[N, L, 2, K, P, D]`; index 0 of the third axis is K, 1 is V. It has the model's dtype,
or is float8_e4m3fn: then `scales` has one number for K and one for V of each layer in turn, and what a page
holds times its scale is the number (none: all are 1). Seen
as `[N * L * 2 * K, P * D]` each line is a head's part of a page, so a gather of lines gives a head's slots
in order without a second copy; seen as `[N * L * 2 * K * P, D]` each line is one token of one head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton_kernels.quantization import INT8_GROUP, layer_scales, to_float8

_QUERIES_PER_MASK = 512  # bounds the memory of masks: this many queries by the slots they may see


@dataclass(frozen=True, slots=True)
class OneTokenRows:
    """Where rows of one token find their context; the same for every layer of a step.

    page_lines: int64 `[R * K * B]`, lines of layer 0's K in the pool seen as `[N * L * 2 * K, P * D]`.
    hidden: bool `[R, 1, 1, S]`, slots that a row must not see.
    hidden_rows, hidden_slots: int64, the coordinates of `hidden`'s true elements.
    """

    page_lines: Tensor
    hidden: Tensor
    hidden_rows: Tensor
    hidden_slots: Tensor


def token_lines(pool: Tensor, slot_mapping: Tensor) -> Tensor:
    """Lines of the pool, seen as `[N * L * 2 * K * P, D]`, that hold layer 0's K of some tokens.

    slot_mapping: int64 `[T]`, page * P + slot in page. Returns int64 `[T * K]`.
    """
    _, num_layers, _, num_kv_heads, block_size, _ = pool.shape
    pages, slots = slot_mapping // block_size, slot_mapping % block_size
    heads = torch.arange(num_kv_heads, device=pool.device)
    lines = (pages * (num_layers * 2 * num_kv_heads))[:, None] + heads  # [T, K]
    return (lines * block_size + slots[:, None]).flatten()


def store_kv(
    pool: Tensor, layer: int, key: Tensor, value: Tensor, lines: Tensor, scales: tuple[float, ...] = ()
) -> None:
    """Write the tokens' K and V of one layer into their slots.

    key, value: `[T, K, D]` in the model's dtype; lines: what `token_lines` gave.
    """
    num_kv_heads, block_size, head_dim = pool.shape[3:]
    tokens = pool.view(-1, head_dim)
    if pool.dtype == torch.float8_e4m3fn:
        rounded = map(to_float8, (key, value), layer_scales(scales, layer))
        key, value = (states.view(torch.uint8) for states in rounded)
        tokens = tokens.view(torch.uint8)
    for part, states in enumerate((key, value)):
        first_line = (layer * 2 + part) * num_kv_heads * block_size
        tokens[first_line:].index_copy_(0, lines, states.reshape(-1, head_dim))


def one_token_rows(
    pool: Tensor, block_tables: Tensor, context_lens: Tensor, window: int | None
) -> OneTokenRows:
    """Prepare attention of rows whose one query is their last token.

    block_tables: int64 `[R, B]`, page of every P positions; what lies beyond a row's context may be any page.
    context_lens: int64 `[R]`, tokens that the row attends to, its own included; at least 1.
    window: a query sees this many last tokens, itself included; None: all. Pages before it are not read.
    """
    block_size = pool.shape[4]
    visible_from = torch.zeros_like(context_lens)
    if window is not None:
        visible_from = (context_lens - window).clamp_(min=0)
    first_blocks = visible_from // block_size  # [R]
    num_blocks = int(((context_lens - 1) // block_size - first_blocks).max()) + 1
    columns = first_blocks[:, None] + torch.arange(num_blocks, device=pool.device)
    blocks = block_tables.gather(1, columns.clamp_(max=block_tables.shape[1] - 1))  # [R, B]
    slots = torch.arange(num_blocks * block_size, device=pool.device)
    positions = (first_blocks * block_size)[:, None] + slots  # [R, S]
    hidden = (positions >= context_lens[:, None]) | (positions < visible_from[:, None])
    hidden_rows, hidden_slots = hidden.nonzero(as_tuple=True)
    return OneTokenRows(page_lines(pool, blocks), hidden[:, None, None, :], hidden_rows, hidden_slots)


def attend_one_token_rows(
    query: Tensor, pool: Tensor, layer: int, rows: OneTokenRows, scales: tuple[float, ...] = ()
) -> Tensor:
    """Attention of rows of one token over their pages, softmax in float32.

    query: `[R, H, D]`. Returns `[R, H, D]` in query's dtype.
    """
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = pool.shape[3]
    key, value = _gather(pool, layer, rows.page_lines, num_rows, scales, torch.float32)
    # A hidden slot may hold another request's NaN or infinity, and 0 * NaN is NaN.
    value[rows.hidden_rows, :, rows.hidden_slots] = 0.0
    grouped = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim).float()
    scores = torch.matmul(grouped * head_dim**-0.5, key.transpose(-1, -2))  # [R, K, H / K, S]
    weights = torch.softmax(scores.masked_fill_(rows.hidden, float("-inf")), dim=-1)
    return torch.matmul(weights, value).view_as(query).to(query.dtype)


def attend_long_row(
    query: Tensor,
    pool: Tensor,
    layer: int,
    lines: Tensor,
    start: int,
    window: int | None,
    scales: tuple[float, ...] = (),
) -> Tensor:
    """Causal attention of many tokens of one row over its cached prefix and themselves.

    query: `[T, H, D]`, positions start .. start + T - 1, whose K and V are stored already.
    lines: what `page_lines` gave for the row's pages, `[1, B]` with B * P >= start + T.
    Returns `[T, H, D]` in query's dtype.
    """
    num_tokens = query.shape[0]
    context_len = start + num_tokens
    gathered = _gather(pool, layer, lines, 1, scales, query.dtype)
    key, value = (states[:, :, :context_len] for states in gathered)
    queries = query.transpose(0, 1)[None]  # [1, H, T, D]
    if start == 0 and (window is None or num_tokens <= window):
        output = F.scaled_dot_product_attention(queries, key, value, is_causal=True, enable_gqa=True)
        return output[0].transpose(0, 1)
    parts = []
    for first in range(0, num_tokens, _QUERIES_PER_MASK):
        part = queries[:, :, first : first + _QUERIES_PER_MASK]
        parts.append(_attend_masked(part, key, value, start + first, window))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def page_lines(pool: Tensor, blocks: Tensor) -> Tensor:
    """Lines of the pool, seen as `[N * L * 2 * K, P * D]`, that hold layer 0's K of some pages.

    blocks: int64 `[R, B]`. Returns int64 `[R * K * B]`, a row's heads in order, a head's pages in order.
    """
    _, num_layers, _, num_kv_heads, _, _ = pool.shape
    heads = torch.arange(num_kv_heads, device=pool.device)
    return (blocks[:, None, :] * (num_layers * 2 * num_kv_heads) + heads[None, :, None]).flatten()


def int8_linear(states: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """`x W^T` of 8-bit weights, the states rounded to 16 bits row by row.

    states: `[T, I]` floating; weight int8 `[O, I]` and scales `[O, groups]`, as `quantization.int8_groups`
    gives them. Returns float64 `[T, O]`.
    """
    states = states.double()
    steps = states.abs().amax(dim=1, keepdim=True) / 32767
    rounded = torch.where(steps > 0, (states / steps).round_() * steps, 0.0)
    sizes = scales.double().repeat_interleave(INT8_GROUP, dim=1)[:, : weight.shape[1]]
    return F.linear(rounded, weight.double() * sizes)


def _gather(
    pool: Tensor, layer: int, lines: Tensor, num_rows: int, scales: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K and V of one layer of some pages: copies, `[R, K, S, D]` of that dtype."""
    num_kv_heads, block_size, head_dim = pool.shape[3:]
    parts = []
    for part, scale in enumerate(layer_scales(scales, layer)):
        first_line = (layer * 2 + part) * num_kv_heads
        numbers = pool.view(-1, block_size * head_dim)[first_line:]
        if pool.dtype == torch.float8_e4m3fn:  # torch moves its bytes, not its numbers
            pages = numbers.view(torch.uint8).index_select(0, lines).view(pool.dtype).float().mul_(scale)
        else:
            pages = numbers.index_select(0, lines)
        parts.append(pages.to(dtype).view(num_rows, num_kv_heads, -1, head_dim))
    return parts[0], parts[1]


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, start: int, window: int | None) -> Tensor:
    """query `[1, H, T, D]` from position `start` on; key, value `[1, K, S, D]` from position 0 on."""
    end = start + query.shape[2]
    first_visible = 0 if window is None else max(0, start - window + 1)
    key_positions = torch.arange(first_visible, end, device=query.device)
    query_positions = torch.arange(start, end, device=query.device)[:, None]
    mask = key_positions <= query_positions  # [T, S]
    if window is not None:
        mask &= key_positions > query_positions - window
    return F.scaled_dot_product_attention(
        query, key[:, :, first_visible:end], value[:, :, first_visible:end], attn_mask=mask, enable_gqa=True
    )
