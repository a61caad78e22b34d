"""The whole engine (scheduler, prefix cache, chunking, preemption) says what transformers says."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from baton.config import EngineConfig
from baton.core.sampling import SamplingParams
from tests.checkpoints import (
    CONFIGS,
    reference_greedy,
    reference_logprobs,
    reference_model,
    write_checkpoint,
)
from tests.colocated import ColocatedEngine

NUM_TOKENS = 64
CONFIG = EngineConfig(dtype="float32", block_size=8, kv_cache_bytes=8 << 20, max_num_batched_tokens=512)
VARIANTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"tie_word_embeddings": False},
    "MistralForCausalLM": {"sliding_window": 24},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 32},
}


class Family:
    """One family's checkpoint, and what transformers says about a few prompts."""

    def __init__(self, directory: Path, architecture: str) -> None:
        self.directory = write_checkpoint(directory, architecture, **VARIANTS[architecture])
        self.model = reference_model(self.directory)
        random_ids = random.Random(7)
        self.prompts = [[random_ids.randrange(2, 160) for _ in range(n)] for n in (1, 5, 16, 33, 70, 121)]
        self.expected = [reference_greedy(self.model, prompt, NUM_TOKENS) for prompt in self.prompts]


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return _family(tmp_path_factory.mktemp(request.param), request.param)


@cache
def _family(directory: Path, architecture: str) -> Family:
    return Family(directory, architecture)


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, **fields)


def test_each_prompt_alone(family: Family) -> None:
    engine = ColocatedEngine(family.directory, CONFIG)
    for prompt, expected in zip(family.prompts, family.expected, strict=True):
        assert engine.token_ids([prompt], greedy()) == [expected]


def test_batch_of_unequal_lengths(family: Family) -> None:
    engine = ColocatedEngine(family.directory, CONFIG)
    assert engine.token_ids(family.prompts, greedy()) == family.expected
    assert engine.num_steps == NUM_TOKENS, "all prompts fit in the first step"


def test_chunked_prefill(family: Family) -> None:
    chunked = EngineConfig(dtype="float32", block_size=8, kv_cache_bytes=8 << 20, max_num_batched_tokens=13)
    engine = ColocatedEngine(family.directory, chunked)
    assert engine.token_ids(family.prompts, greedy()) == family.expected
    assert engine.num_steps > NUM_TOKENS


def _in_full_blocks(token_ids: Sequence[int]) -> int:
    """Tokens that a prefix cache may give: the last one is always computed."""
    return (len(token_ids) - 1) // CONFIG.block_size * CONFIG.block_size


def test_prefix_cache_hits(family: Family) -> None:
    engine = ColocatedEngine(family.directory, CONFIG)
    assert engine.token_ids(family.prompts, greedy()) == family.expected
    hits_before = engine.pool.num_hit_tokens
    assert engine.token_ids(family.prompts, greedy()) == family.expected
    in_full_blocks = sum(_in_full_blocks(prompt) for prompt in family.prompts)
    assert engine.pool.num_hit_tokens - hits_before == in_full_blocks
    # A conversation goes on: the answer's own pages are found, too.
    longer = family.prompts[3] + family.expected[3]
    expected = reference_greedy(family.model, longer, NUM_TOKENS)
    assert engine.token_ids([longer], greedy()) == [expected]
    assert engine.pool.num_hit_tokens - hits_before - in_full_blocks == _in_full_blocks(longer)


def test_preemption(family: Family) -> None:
    # The two longest need 24 pages each in the end.
    engine = ColocatedEngine(family.directory, CONFIG, num_blocks=28)
    assert engine.token_ids(family.prompts, greedy()) == family.expected
    assert engine.scheduler.num_preemptions > 0


def test_choices_of_one_prompt(family: Family) -> None:
    engine = ColocatedEngine(family.directory, CONFIG)
    [choices] = engine.generate([family.prompts[3]], greedy(n=3))
    assert [[token.token_id for token in choice] for choice in choices] == [family.expected[3]] * 3


def test_logprobs(family: Family) -> None:
    engine = ColocatedEngine(family.directory, CONFIG)
    answers = engine.generate(family.prompts, greedy(num_logprobs=5))
    for prompt, [tokens] in zip(family.prompts, answers, strict=True):
        output = [token.token_id for token in tokens]
        reference = reference_logprobs(family.model, prompt + output)[len(prompt) - 1 : -1]
        for row, token in zip(reference, tokens, strict=True):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
            best = row.topk(5)
            assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
            assert [value for _, value in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_seeded_sampling_depends_on_seed_and_position_alone(family: Family) -> None:
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=1234, max_tokens=NUM_TOKENS, n=2)
    engine = ColocatedEngine(family.directory, CONFIG)
    together = engine.generate(family.prompts, params)
    for prompt, expected in zip(family.prompts, together, strict=True):
        [alone] = ColocatedEngine(family.directory, CONFIG).generate([prompt], params)
        assert [[t.token_id for t in choice] for choice in alone] == [
            [t.token_id for t in choice] for choice in expected
        ]
        assert alone[0] != alone[1]
