"""Requests for the scheduler's tests, and what each of them yields when it runs alone."""

from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

from baton.core.block_pool import BlockPool
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.core.stopping import FinishReason
from tests.core.fake_runner import VOCABULARY_SIZE, FakeRunner

PROMPT_VOCABULARY_SIZE = 10_000  # prompts may hold more ids than the fake runner samples
SEED = chain_seed(b"fingerprint of the fake model")
FAMILIES = tuple(tuple((3 * family + 5 * i) % VOCABULARY_SIZE for i in range(64)) for family in range(2))

tokens = st.integers(0, VOCABULARY_SIZE - 1)


def make_request(
    request_id: str,
    prompt: tuple[int, ...],
    block_size: int,
    *,
    priority: int = 0,
    hash_seed: bytes = SEED,
    answered: tuple[int, ...] = (),
    **sampling: Any,
) -> EngineRequest:
    """A request with its hashes, as a router would make it; `sampling` goes to SamplingParams."""
    hashes = tuple(block_hashes(hash_seed, (*prompt, *answered), block_size))
    params = SamplingParams(**sampling)
    return EngineRequest(request_id, prompt, hash_seed, hashes, params, priority, answered)


@st.composite
def prompts(draw: st.DrawFn, max_size: int) -> tuple[int, ...]:
    """Prompts of which many share a prefix."""
    shared = FAMILIES[draw(st.integers(0, 1))][: draw(st.integers(0, max_size - 1))]
    tail = draw(st.lists(tokens, min_size=1, max_size=3))
    return (*shared, *tail)[:max_size]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Few seeds, so that choices and requests repeat one another; short outputs."""
    max_tokens = draw(st.integers(1, 12))
    return SamplingParams(
        seed=draw(st.integers(0, 3)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(2, max_tokens))),
        stop_token_ids=draw(st.sampled_from([(), (), (0,), (1, 2)])),
        n=draw(st.sampled_from([1, 1, 2, 3])),
        # The fake runner's tokens don't depend on it, but a scheduler must not run ahead of it.
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 0.5])),
    )


Outcome = tuple[tuple[int, ...], FinishReason]


@lru_cache(maxsize=20_000)
def alone(prompt: tuple[int, ...], sampling: SamplingParams, max_model_len: int) -> tuple[Outcome, ...]:
    """Tokens and end of every choice of a request that has a large engine to itself."""
    config = SchedulerConfig(
        8,
        max_model_len,
        max_num_seqs=sampling.n,
        max_num_batched_tokens=10_000,
        vocab_size=PROMPT_VOCABULARY_SIZE,
    )
    scheduler, runner = Scheduler(config, BlockPool(200)), FakeRunner(200, config.block_size)
    hashes = tuple(block_hashes(SEED, prompt, config.block_size))
    scheduler.add(EngineRequest("alone", prompt, SEED, hashes, sampling))
    outputs: list[list[int]] = [[] for _ in range(sampling.n)]
    reasons: dict[int, FinishReason] = {}
    while (step := scheduler.schedule()) is not None:
        for event in scheduler.apply(step, runner.run(step.plan)).tokens:
            outputs[event.choice].append(event.token.token_id)
            if event.finish_reason is not None:
                reasons[event.choice] = event.finish_reason
    assert scheduler.num_preemptions == 0
    return tuple((tuple(output), reasons[choice]) for choice, output in enumerate(outputs))
