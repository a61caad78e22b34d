"""Pages as bytes: the pool's own memory, in the layout that transfers agree on."""

import pytest
import torch

from baton.core.kv_layout import DTYPE_BYTES, KVLayout
from baton.core.page_ports import PageStore
from baton.core.ports import Runner
from baton.engine.pages.kv_cache import KVCache
from tests.engine.driver import GREEDY_LOGPROBS, Driver, Request, make_prompt

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_page_is_the_pools_own_memory(dtype):
    layout = KVLayout(block_size=4, num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)
    cache = KVCache(layout, 5, CPU)
    store: PageStore = cache
    pool = cache.pool
    assert pool.shape == (6, 3, 2, 2, 4, 8)
    pool.copy_(torch.arange(pool.numel()).view(pool.shape) % 97)
    page = store.page(2, 1, 2)
    assert (page.nbytes, page.readonly, page.contiguous) == (2 * layout.bytes_per_layer, False, True)
    assert torch.equal(torch.frombuffer(page, dtype=pool.dtype).view(2, 2, 2, 4, 8), pool[2, 1:3])
    before = pool.clone()
    page[:] = bytes(page.nbytes)
    assert (pool[2, 1:3] == 0).all()
    before[2, 1:3] = 0
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    ("block", "first", "count"), [(5, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2, 2), (0, 3, 1)]
)
def test_page_outside_the_pool(block, first, count):
    store = KVCache(KVLayout(4, 3, 2, 8, "float32"), 5, CPU)
    with pytest.raises(IndexError):
        store.page(block, first, count)


def test_another_engine_continues_from_the_bytes(engine):
    """Prefill on one engine, the pages' bytes moved layer by layer, decode on another."""
    sender, receiver = Driver(engine("qwen3-window"), seed=1), Driver(engine("qwen3-window"), seed=2)
    request = Request(make_prompt(50), GREEDY_LOGPROBS)
    sender.generate([request], 1)
    moved = Request(request.prompt, GREEDY_LOGPROBS, list(request.output), list(request.sampled), 50)
    for block in request.block_table:
        moved.block_table.append(receiver.free.pop())
        for layer in range(3):
            source = sender.engine.page_store.page(block, layer, 1)
            receiver.engine.page_store.page(moved.block_table[-1], layer, 1)[:] = source
    sender.generate([request], 16)
    receiver.generate([moved], 16)
    assert moved.sampled == request.sampled


def test_ports(engine):
    """What the core needs is there, as mypy sees it in the services."""
    loaded = engine("llama")
    runner: Runner = loaded.runner
    store: PageStore = loaded.page_store
    assert runner is loaded.runner
    assert store.num_blocks == len(loaded.page_store.pool) - 1
