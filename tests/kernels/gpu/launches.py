"""One launch of every kernel at the shapes that it is for: Llama 8B's, and some that need masks."""

from typing import Any

import torch

from baton_kernels.gpu import (
    checksum,
    float8,
    one_row,
    page_copies,
    paged_decode,
    paged_prefill,
    penalties,
    rotary_store,
    row_functions,
    sample_tokens,
)
from baton_kernels.reads import Normalise, SiluGate

_LLAMA = (torch.bfloat16, 128, 4, {})
_OTHERS = (
    (torch.float16, 64, 7, {"window": 100, "soft_cap": 30.0}),
    (torch.bfloat16, 96, 1, {"window": 100}),
    (torch.float32, 128, 4, {"soft_cap": 30.0}),
    (torch.bfloat16, 256, 2, {}),
)


def launch_all(device: str = "cpu", llama_only: bool = False) -> None:
    """Values do not matter, only shapes and dtypes; pages are few."""
    for dtype, head_dim, group, options in (_LLAMA,) if llama_only else (_LLAMA, *_OTHERS):
        for pool_dtype in (dtype, torch.float8_e4m3fn):
            _attend(dtype, pool_dtype, head_dim, group, device, **options)
    _rows(device)
    _sample(device)


def _attend(
    dtype: torch.dtype, pool_dtype: torch.dtype, head_dim: int, group: int, device: str, **options: Any
) -> None:
    pool = torch.zeros(4, 2, 2, 2, 16, head_dim, dtype=pool_dtype, device=device)
    key, value = pool[:, 1, 0], pool[:, 1, 1]
    tables = torch.zeros(2, 4, dtype=torch.int32, device=device)
    lengths = torch.tensor([40, 8], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 20, 23], dtype=torch.int32, device=device)
    qkv = torch.zeros(23, 2 * group + 4, head_dim, dtype=dtype, device=device)
    angles = torch.zeros(23, 1, head_dim, dtype=dtype, device=device)
    slots = torch.arange(23, device=device)
    query = rotary_store.rotate_and_store(qkv, angles, angles, key, value, slots)
    rotary_store.store(qkv[:, -4:-2], qkv[:, -2:], key, value, slots)
    for num_splits in (1, 8):
        paged_decode.attend_one_token_rows(
            query[:2], key, value, tables, lengths, num_splits=num_splits, **options
        )
    paged_prefill.attend_long_rows(query, key, value, tables, lengths, bounds, 20, **options)
    blocks = torch.tensor([3, 1], device=device)
    page_copies.scatter_blocks(page_copies.gather_blocks(pool, blocks, 0, 2), pool, blocks, 0)
    words = pool.view(-1).view(torch.int32)
    checksum.crc32c_remainder(words, torch.zeros(1, dtype=torch.int32, device=device))


def _rows(device: str) -> None:
    states = torch.ones(3, 4096, dtype=torch.bfloat16, device=device)
    float8.float8_rows(states)
    float8.float8_rows(torch.ones(3, 14336, dtype=torch.bfloat16, device=device))
    row_functions.rms_norm(states, states[0], 1e-5)
    row_functions.add_rms_norm(states, states.clone(), states[0], 1e-5)
    gate_up = torch.ones(3, 2 * 14336, dtype=torch.bfloat16, device=device)
    row_functions.gated_silu(gate_up)
    row = states[:1]
    qkv, output, down = (
        torch.ones(shape, dtype=torch.bfloat16, device=device)
        for shape in ((6144, 4096), (4096, 4096), (4096, 14336))
    )
    one_row.one_row(row, qkv, None, Normalise(row[0], 1e-5))
    one_row.one_row(row, output, None, None, row.clone())
    one_row.one_row(gate_up[:1], down, None, SiluGate(), row.clone())


def _sample(device: str) -> None:
    logits = torch.zeros(2, 128_256, dtype=torch.bfloat16, device=device)
    ones = torch.ones(2, device=device)
    long = torch.zeros(2, dtype=torch.int64, device=device)
    rows = sample_tokens.SamplingRows(long, ones, long.int(), ones.double(), 0 * ones, long, long)
    sample_tokens.sample_tokens(logits, rows)
    sample_tokens.sample_tokens(logits.float(), rows)
    counts = torch.zeros(2, 128_256, dtype=torch.int32, device=device)
    penalties.penalise(logits.float(), counts, counts, ones, ones, ones)
