"""Workers that die in mid-answer under the model that ships: it says what it would have said."""

import threading
from dataclasses import replace
from typing import Any

import pytest

from baton.config import EngineConfig
from baton.core.sampling import SamplingParams
from baton.engine.factory import load_engine
from baton.grammars import formats
from tests.colocated import ColocatedEngine
from tests.e2e.processes import DEMO_MODEL
from tests.services.cluster import Limits, cluster
from tests.services.fake_engine import FINGERPRINT, fake_layout
from tests.services.test_failover import die_without_a_word, num_lost
from tests.services.test_mid_answer import TWO, Client, candidates, silent_after, tokens_of_prefill

BLOCK_SIZE = 16
CONFIG = EngineConfig(
    block_size=BLOCK_SIZE,
    dtype="float32",
    kv_cache_bytes=16 << 20,
    max_num_batched_tokens=96,
    max_num_seqs=8,
    num_threads=1,
)
PROMPT = tuple((37 * index + 11) % 250 + 4 for index in range(45))
NUM_TOKENS = 30

SCHEMA = formats.to_text(formats.json_schema({"type": "array", "items": {"type": "string", "minLength": 50}}))
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": 99},
    "penalties": {
        "temperature": 0.0,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
    "seeded, with penalties": {"temperature": 1.1, "seed": 7, "presence_penalty": 2.0},
    "a schema": {"temperature": 1.0, "seed": 11, "grammar": SCHEMA, "stop_token_ids": (1,)},
    "choices with a schema": {"temperature": 1.0, "seed": 3, "n": 3, "grammar": SCHEMA},
    "choices": {"temperature": 1.0, "seed": 5, "n": 3, "frequency_penalty": 1.0, "num_logprobs": 0},
}


def load_model(_: object) -> Any:
    """An engine with the tests' fingerprint and a gate that is always open."""
    engine = load_engine(DEMO_MODEL, CONFIG)
    engine.runner.gate = threading.Event()  # type: ignore[attr-defined]
    return replace(engine, fingerprint=FINGERPRINT)


MODEL = Limits(
    layout=fake_layout(BLOCK_SIZE), max_num_batched_tokens=96, max_num_seqs=8, on_device=load_model
)


@pytest.fixture(scope="module")
def undisturbed() -> ColocatedEngine:
    return ColocatedEngine(DEMO_MODEL, CONFIG)


@pytest.mark.parametrize("num_answered", [2, 19])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("role", TWO)
async def test_the_answer_is_the_same(
    role: str, sampling: str, num_answered: int, undisturbed: ColocatedEngine
) -> None:
    params = SamplingParams(max_tokens=NUM_TOKENS, **SAMPLINGS[sampling])
    [right] = undisturbed.generate([list(PROMPT)], params)
    async with cluster(MODEL, MODEL, MODEL, **TWO[role]) as running:
        lost = candidates(running)[0]
        silent_after(lost, num_answered - tokens_of_prefill(running))
        request = running.request(PROMPT, **{**SAMPLINGS[sampling], "max_tokens": NUM_TOKENS})
        client = Client(running, request)
        await client.has(num_answered)
        await die_without_a_word(lost)
        answer = await client.ends()
        assert answer.tokens == [[token.token_id for token in tokens] for tokens in right]
        assert num_lost(running) == 1
