"""A setting that float32 can't hold costs nobody their request, and gives a token of the vocabulary."""

import queue
from pathlib import Path

import pytest
import torch

import baton
from baton.config import EngineConfig
from baton.core.block_pool import BlockPool
from baton.core.commands import AddRequest
from baton.core.plan import SampleTask
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.engine.factory import load_engine
from baton.engine.loop import EngineLoop
from baton.engine.sampler import sample

TINY = [
    {"temperature": 1e-50},
    {"temperature": 5e-324},
    {"repetition_penalty": 1e-40},
    {"repetition_penalty": 1e-300, "temperature": 1e-300},
]


@pytest.mark.parametrize("settings", TINY)
def test_the_token_is_one_of_the_vocabulary(settings):
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 3
    task = SampleTask(SamplingParams(**settings), 1, 5, tuple(range(500)), [1, 2])
    [token] = sample(logits, [(0, task)])
    assert 0 <= token.token_id < 1000


@pytest.mark.parametrize("settings", TINY)
def test_others_in_the_batch_go_on(settings):
    engine = load_engine(
        Path(baton.__file__).parent / "demo_model", EngineConfig(kv_cache_bytes=32 << 20, device="cpu")
    )
    size = engine.page_store.layout.block_size
    config = SchedulerConfig(size, engine.max_model_len, 8, 256, engine.vocab_size)
    outputs = queue.SimpleQueue()
    loop = EngineLoop(
        Scheduler(config, BlockPool(engine.page_store.num_blocks)), engine.runner, outputs.put, outputs.put
    )

    def request(name, **sampling):
        prompt, seed = tuple(range(40, 60)), chain_seed(b"x")
        params = SamplingParams(max_tokens=20, **sampling)
        loop.submit(
            AddRequest(EngineRequest(name, prompt, seed, tuple(block_hashes(seed, prompt, size)), params))
        )

    request("innocent")
    request("tiny", **settings)
    loop.start()
    failures, ended = {}, set()
    while len(ended | set(failures)) < 2:
        output = outputs.get(timeout=30)
        assert not isinstance(output, Exception), output
        failures |= {failure.request_id: failure.message for failure in output.failures}
        ended |= {event.request_id for event in output.tokens if event.finish_reason}
    loop.stop(5)
    assert not failures, failures
