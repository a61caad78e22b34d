"""Paged attention and the KV store against a dense float64 implementation, over random shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.plan import ScheduledRow, StepPlan
from baton.engine.attention.plain_torch import CpuAttention
from baton.engine.inputs import build_inputs

SHAPES = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 8, 16]),
        "block_size": st.sampled_from([1, 3, 16]),
        "window": st.one_of(st.none(), st.integers(1, 24)),
        "rows": st.lists(
            st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 1, 2, 20])), min_size=1, max_size=5
        ),
        "seed": st.integers(0, 2**31),
    }
)


def dense_attention(query, key, value, start, window):
    """query `[T, H, D]` at positions from `start` on; key, value `[S, K, D]` from 0 on. All float64."""
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for token in range(query.shape[0]):
        position = start + token
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(query.shape[1]):
            keys = key[first : position + 1, head // group]
            weights = torch.softmax(keys @ query[token, head] * query.shape[2] ** -0.5, dim=0)
            output[token, head] = weights @ value[first : position + 1, head // group]
    return output


def paged_rows(rows, block_size, generator):
    """Scheduled rows with pages in random order, and how many pages there are."""
    counts = [-(-(start + length) // block_size) for start, length in rows]
    pages = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    scheduled = []
    for (start, length), count in zip(rows, counts, strict=True):
        table, pages = pages[:count], pages[count:]
        scheduled.append(ScheduledRow([0] * length, start, table))
    return scheduled, sum(counts) + 3


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_equals_dense_attention(shape):
    generator = torch.Generator().manual_seed(shape["seed"])
    kv_heads, head_dim, block_size = shape["kv_heads"], shape["head_dim"], shape["block_size"]
    rows, num_blocks = paged_rows(shape["rows"], block_size, generator)
    windows, layer = (None, shape["window"], None), 1
    pool = torch.full((num_blocks + 1, 3, 2, kv_heads, block_size, head_dim), float("nan"))
    contexts = []
    for row in rows:  # what earlier steps left, straight into the pages
        length = row.start + len(row.token_ids)
        context = torch.randn(2, length, kv_heads, head_dim, generator=generator)
        for position in range(row.start):
            page, slot = row.block_table[position // block_size], position % block_size
            pool[page, layer, :, :, slot] = context[:, position]
        contexts.append(context)
    inputs = build_inputs(StepPlan(tuple(rows)), block_size, num_blocks, torch.device("cpu"))
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].token_ids) > 1, sum(shape["rows"][i])))
    key, value = (torch.cat([contexts[i][part, rows[i].start :] for i in order]) for part in (0, 1))
    query = torch.randn(len(key), kv_heads * shape["group"], head_dim, generator=generator)
    output = CpuAttention(pool, windows).begin_step(inputs.attention).attend(layer, query, key, value)
    first = 0
    for index in order:
        row, context = rows[index], contexts[index]
        end = first + len(row.token_ids)
        key, value = context.double()
        expected = dense_attention(query[first:end].double(), key, value, row.start, shape["window"]).float()
        assert torch.allclose(output[first:end], expected, atol=2e-6, rtol=1e-5)
        first = end
        for position in range(context.shape[1]):
            page, slot = row.block_table[position // block_size], position % block_size
            assert torch.equal(pool[page, layer, :, :, slot], context[:, position])
    untouched = torch.ones(num_blocks + 1, 3, block_size, dtype=torch.bool)
    for row in rows:
        for position in range(row.start + len(row.token_ids)):
            untouched[row.block_table[position // block_size], layer, position % block_size] = False
    assert pool.permute(0, 1, 4, 2, 3, 5)[untouched].isnan().all()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())
def test_half_precision(dtype, is_long):
    generator = torch.Generator().manual_seed(1)
    pool = torch.zeros(5, 1, 2, 2, 16, 8, dtype=dtype)
    length = 30 if is_long else 1
    row = ScheduledRow([0] * length, 30 - length, [3, 1])
    context = torch.randn(2, 30, 2, 8, generator=generator).to(dtype)
    pool[3, 0], pool[1, 0, :, :, :14] = context[:, :16].transpose(1, 2), context[:, 16:].transpose(1, 2)
    inputs = build_inputs(StepPlan((row,)), 16, 4, torch.device("cpu"))
    query = torch.randn(length, 4, 8, generator=generator).to(dtype)
    step = CpuAttention(pool, (None,)).begin_step(inputs.attention)
    output = step.attend(0, query, *context[:, 30 - length :])
    assert output.dtype == dtype
    keys, values = context.double()
    expected = dense_attention(query.double(), keys, values, 30 - length, None)
    assert torch.allclose(output.double(), expected, atol=2e-2)
