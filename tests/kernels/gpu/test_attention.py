"""Paged attention against dense float64 attention, over random shapes, block tables and dtypes."""

import pytest
import torch

from baton_kernels.gpu.paged_decode import attend_one_token_rows, splits_for
from baton_kernels.gpu.paged_prefill import attend_long_rows
from tests.kernels.gpu.paged import TOLERANCE, expected, problem, relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (kv_heads, group, head_dim, block_size, dtype, window, soft_cap)
SHAPES = [
    (2, 2, 64, 16, F32, None, None),
    (1, 1, 128, 16, BF16, None, None),
    (1, 7, 24, 3, F32, 19, None),
    (1, 4, 32, 16, F16, 70, 20.0),
    (3, 2, 16, 1, F32, None, 5.0),
    (1, 17, 80, 32, BF16, 1, None),
]


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_size", "dtype", "window", "soft_cap"), SHAPES
)
def test_one_token_rows(device, kv_heads, group, head_dim, block_size, dtype, window, soft_cap, num_splits):
    rows = [(0, 1), (16, 1), (63, 1), (310, 1)]
    given = problem(
        rows, kv_heads=kv_heads, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype,
        seed=head_dim, device=device,
    )  # fmt: skip
    output = torch.full_like(given.query, float("nan"))
    attend_one_token_rows(
        given.query, given.key, given.value, given.block_tables, given.context_lens,
        num_splits=num_splits, window=window, soft_cap=soft_cap, output=output,
    )  # fmt: skip
    assert relative_error(output, expected(given, rows, window, soft_cap)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_size", "dtype", "window", "soft_cap"), SHAPES
)
def test_long_rows(device, kv_heads, group, head_dim, block_size, dtype, window, soft_cap):
    # Tiles are larger for half precision; one row at least has several, of queries and of keys.
    rows = [(0, 5), (37, 40), (0, 1), (60, 70)] if dtype == F32 else [(0, 5), (20, 140), (0, 1)]
    rows = rows[1:2] if group > 8 else rows
    longest = max(length for _, length in rows)
    given = problem(
        rows, kv_heads=kv_heads, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype,
        seed=head_dim, device=device,
    )  # fmt: skip
    output = torch.full_like(given.query, float("nan"))
    attend_long_rows(
        given.query, given.key, given.value, given.block_tables, given.context_lens, given.row_bounds,
        longest, window=window, soft_cap=soft_cap, output=output,
    )  # fmt: skip
    assert relative_error(output, expected(given, rows, window, soft_cap)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_float8_pages(device, dtype):
    """Rows of both kinds over float8 K and V, each with a scale."""
    rows, scales = [(40, 1), (200, 1), (37, 70)], (0.25, 0.013)
    given = problem(
        rows, kv_heads=2, group=2, head_dim=32, block_size=16, dtype=dtype, seed=11, device=device,
        float8_scales=scales,
    )  # fmt: skip
    output = torch.full_like(given.query, float("nan"))
    attend_one_token_rows(
        given.query[:2], given.key, given.value, given.block_tables, given.context_lens[:2],
        num_splits=2, scales=scales, output=output[:2],
    )  # fmt: skip
    attend_long_rows(
        given.query, given.key, given.value, given.block_tables[2:], given.context_lens[2:],
        given.row_bounds[2:], 70, scales=scales, output=output,
    )  # fmt: skip
    assert relative_error(output, expected(given, rows, None, None)) < TOLERANCE[dtype]


def test_strided_queries(device):
    """Queries as a slice of qkv, without a copy."""
    rows = [(20, 1), (3, 1)]
    given = problem(rows, kv_heads=2, group=2, head_dim=16, block_size=4, dtype=F32, seed=5, device=device)
    wide = torch.randn(2, 9, 16, device=device)
    wide[:, 1:5] = given.query
    output = attend_one_token_rows(
        wide[:, 1:5], given.key, given.value, given.block_tables, given.context_lens, num_splits=2
    )
    assert relative_error(output, expected(given, rows, None, None)) < TOLERANCE[F32]


def test_splits():
    assert splits_for(1, 8, 132) == 64
    assert splits_for(16, 8, 132) == 8
    assert splits_for(256, 8, 132) == 1


@pytest.mark.gpu
def test_graph_replays_for_other_lengths(device):
    """One capture, then contexts that it has not seen, bit for bit as without a graph."""
    rows = [(700, 1), (1500, 1)]
    given = problem(rows, kv_heads=2, group=4, head_dim=128, block_size=16, dtype=BF16, seed=1, device=device)
    arguments = (given.query, given.key, given.value, given.block_tables, given.context_lens)
    output = torch.empty_like(given.query)
    attend_one_token_rows(*arguments, num_splits=4, output=output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_one_token_rows(*arguments, num_splits=4, output=output)
    for lengths in ([1, 1501], [333, 64], [701, 1024]):
        given.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, attend_one_token_rows(*arguments, num_splits=4))
