"""Random paged problems, and dense attention in float64 as the independent reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative error of the norm: float32 sums, then one rounding to the dtype; bf16 also rounds the weights.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Problem:
    """Rows in pages of a pool whose other slots are NaN."""

    pool: Tensor  # [N, L, 2, K, P, D]
    layer: int
    query: Tensor  # [T, H, D]
    block_tables: Tensor  # int32 [R, B]
    context_lens: Tensor  # int32 [R]
    row_bounds: Tensor  # int32 [R + 1]
    contexts: list[Tensor]  # of each row [2, context, K, D]

    @property
    def key(self) -> Tensor:
        return self.pool[:, self.layer, 0]

    @property
    def value(self) -> Tensor:
        return self.pool[:, self.layer, 1]


def problem(
    rows: list[tuple[int, int]],
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    float8_scales: tuple[float, float] | None = None,
) -> Problem:
    """rows: (tokens of prefix, tokens of the row). With scales of K and V the pool is float8."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(start + length) // block_size) for start, length in rows]
    pages = torch.randperm(sum(counts) + 3, generator=generator).int()
    layer, num_layers = 1, 3
    pool = torch.full((len(pages), num_layers, 2, kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    tables = torch.full((len(rows), max(counts) + 1), int(pages[-1]), dtype=torch.int32)
    contexts, used = [], 0
    for table, (start, length), count in zip(tables, rows, counts, strict=True):
        table[:count] = pages[used : used + count]
        used += count
        context = torch.randn(2, start + length, kv_heads, head_dim, generator=generator).to(dtype)
        if float8_scales is None:
            contexts.append(context)
        else:
            factors = torch.tensor(float8_scales).view(2, 1, 1, 1)
            context = (context.float() / factors).to(torch.float8_e4m3fn).float()
            contexts.append(context.double() * factors.double())
        for position in range(start + length):
            pool[table[position // block_size], layer, :, :, position % block_size] = context[:, position]
    if float8_scales is not None:
        pool = pool.float().to(torch.float8_e4m3fn)
    lengths = torch.tensor([length for _, length in rows])
    query = torch.randn(int(lengths.sum()), kv_heads * group, head_dim, generator=generator).to(dtype)
    bounds = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    context_lens = torch.tensor([start + length for start, length in rows], dtype=torch.int32)
    return Problem(
        pool.to(device),
        layer,
        query.to(device),
        tables.to(device),
        context_lens.to(device),
        bounds.to(device),
        contexts,
    )


def expected(
    given: Problem, rows: list[tuple[int, int]], window: int | None, soft_cap: float | None
) -> Tensor:
    """float64 `[T, H, D]` on the CPU."""
    query = given.query.cpu().double()
    outputs, first = [], 0
    for context, (start, length) in zip(given.contexts, rows, strict=True):
        part = query[first : first + length]
        key, value = context.double()
        outputs.append(dense_attention(part, key, value, start, window, soft_cap))
        first += length
    return torch.cat(outputs)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, start: int, window: int | None, soft_cap: float | None
) -> Tensor:
    """query `[T, H, D]` at positions from `start` on; key, value `[S, K, D]` from 0 on."""
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", query, keys) * query.shape[2] ** -0.5
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = (start + torch.arange(len(query)))[:, None] - torch.arange(len(key))
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    return torch.einsum("hts,shd->thd", weights, values)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Of the norm; NaN stays NaN."""
    difference = output.cpu().double() - reference
    return float(difference.norm() / reference.norm())
