"""What a grammar does to tokens, and a grammar that comes to no end."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.config import EngineConfig
from baton.core.fields import FormatText
from baton.core.plan import SampleTask
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.core.scheduler import Scheduler
from baton.engine import sampler
from baton.engine.sampler import sample
from tests.checkpoints import write_checkpoint
from tests.colocated import ColocatedEngine
from tests.core.grammars import Allowing

VOCABULARY_SIZE, END = 160, 1
CONFIG = EngineConfig(dtype="float32", kv_cache_bytes=4 << 20, block_size=16)
PROMPT = tuple(range(20, 40))


@pytest.fixture(params=["C kernels", "torch"])
def _computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(sampler, "cpu_kernels", lambda: None)


def token(params: SamplingParams, allowed: set[int], logits: torch.Tensor, output: Sequence[int] = ()) -> int:
    matcher = Allowing(allowed).matcher()
    task = SampleTask(params, params.seed, len(PROMPT) + len(output), PROMPT, list(output), matcher)
    [sampled] = sample(logits[None], [(0, task)])
    return sampled.token_id


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3}, {"logit_bias": ((4, 50.0), (7, 3.0))}])
def test_only_allowed_tokens_are_drawn(temperature: float, more: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    allowed = {3, 7, 90, 159}
    found = set()
    for seed in range(60):
        logits = torch.randn(VOCABULARY_SIZE, generator=generator) * 2
        logits[4] = 100.0
        params = SamplingParams(temperature=temperature, seed=seed, **more)
        found.add(token(params, allowed, logits))
        if not more and not temperature:
            assert token(params, allowed, logits) == max(allowed, key=lambda index: float(logits[index]))
    assert found == allowed


@pytest.mark.usefixtures("_computed_by")
def test_where_only_the_end_is_allowed_min_tokens_give_way() -> None:
    params = SamplingParams(temperature=1.0, min_tokens=5, max_tokens=9, stop_token_ids=(END,))
    logits = torch.zeros(VOCABULARY_SIZE)
    assert token(params, {END}, logits) == END
    assert token(params, {END, 9}, logits) == 9


@pytest.mark.usefixtures("_computed_by")
def test_rows_without_a_grammar_are_as_they_were() -> None:
    logits = torch.randn(2, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.0, num_logprobs=2)
    plain = SampleTask(params, 0, 20, PROMPT, [])
    ruled = replace(plain, matcher=Allowing({5}).matcher())
    first, second = sample(logits, [(0, plain), (1, ruled)])
    assert first == sample(logits, [(0, plain)])[0]
    assert second.token_id == 5
    assert second.top_logprobs == sample(logits, [(1, plain)])[0].top_logprobs  # the model's own


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ColocatedEngine:
    return ColocatedEngine(write_checkpoint(Path(tmp_path_factory.mktemp("model"))), CONFIG)


def add(scheduler: Scheduler, request_id: str, grammar: Allowing | None, **sampling: Any) -> None:
    seed = chain_seed(b"x")
    text = FormatText("" if grammar is None else "of this test")
    params = SamplingParams(temperature=0.0, max_tokens=12, grammar=text, **sampling)
    hashes = tuple(block_hashes(seed, PROMPT, CONFIG.block_size))
    scheduler.add(EngineRequest(request_id, PROMPT, seed, hashes, params, grammar=grammar))


def outputs(engine: ColocatedEngine) -> Iterator[tuple[dict[str, list[int]], dict[str, str]]]:
    while (step := engine.scheduler.schedule()) is not None:
        events = engine.scheduler.apply(step, engine.engine.runner.submit(step.plan).collect())
        tokens: dict[str, list[int]] = {}
        for event in events.tokens:
            tokens.setdefault(event.request_id, []).append(event.token.token_id)
        yield tokens, events.failures


def test_a_grammar_without_a_way_on_ends_its_request_alone(engine: ColocatedEngine) -> None:
    add(engine.scheduler, "dead end", Allowing(lambda output: {9} if len(output) < 3 else set()), n=2)
    add(engine.scheduler, "plain", None)
    tokens: dict[str, list[int]] = {}
    failures: dict[str, str] = {}
    for step_tokens, step_failures in outputs(engine):
        for request_id, token_ids in step_tokens.items():
            tokens.setdefault(request_id, []).extend(token_ids)
        failures |= step_failures
    assert tokens["dead end"] == [9] * 6
    assert failures == {"dead end": "nothing may come after [9, 9, 9]"}
    assert len(tokens["plain"]) == 12
    engine.pool.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_each_choice_has_its_own_way(engine: ColocatedEngine) -> None:
    """What a choice may say depends on what it said, not on the others."""
    add(engine.scheduler, "id", Allowing(lambda output: {30, 31} if not output else {output[0] + 10}), n=8)
    for _, failures in outputs(engine):
        assert not failures


def test_a_complete_answer_ends(engine: ColocatedEngine) -> None:
    grammar = Allowing(lambda output: {9} if len(output) < 3 else {END})
    add(engine.scheduler, "id", grammar, min_tokens=8, stop_token_ids=(END,))
    assert [tokens["id"] for tokens, _ in outputs(engine)] == [[9], [9], [9], [END]]


@pytest.mark.usefixtures("_computed_by")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_tokens_and_bad_words(temperature: float) -> None:
    """A word of several tokens is kept out where all but its last stand."""
    logits = torch.zeros(VOCABULARY_SIZE)
    generator = torch.Generator().manual_seed(3)

    def drawn(output: Sequence[int], **sampling: Any) -> set[int]:
        found = set()
        for seed in range(40):
            noise = torch.randn(VOCABULARY_SIZE, generator=generator) if temperature == 0.0 else 0.0
            params = SamplingParams(temperature=temperature, seed=seed, **sampling)
            task = SampleTask(params, seed, len(PROMPT) + len(output), PROMPT, list(output))
            found.add(sample((logits + noise)[None], [(0, task)])[0].token_id)
        return found

    assert drawn([], allowed_token_ids=(5, 9, 159)) == {5, 9, 159}
    assert drawn([], allowed_token_ids=(5, 9), bad_words=((9,),)) == {5}
    assert drawn([], allowed_token_ids=(9,), bad_words=((9,),)) == {9}  # something has to come
    words = ((7, 8, 5), (6,), (4, 5))
    assert drawn([7, 8], allowed_token_ids=(5, 6, 9), bad_words=words) == {9}
    assert drawn([8], allowed_token_ids=(5, 6, 9), bad_words=words) == {5, 9}
    assert drawn([8, 4], allowed_token_ids=(5, 6, 9), bad_words=words) == {9}
    matcher = Allowing({5, 6, 9}).matcher()
    params = SamplingParams(temperature=temperature, allowed_token_ids=(6, 9, 11), bad_words=((6,),))
    task = SampleTask(params, 1, len(PROMPT), PROMPT, [], matcher)
    assert sample(logits[None], [(0, task)])[0].token_id == 9


@pytest.mark.usefixtures("_computed_by")
def test_logprobs_of_tokens_by_id() -> None:
    """After the likeliest, in order, and none twice."""
    logits = torch.randn(1, VOCABULARY_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    expected = torch.log_softmax(logits[0], dim=-1)
    first, second, third = expected.topk(3).indices.tolist()
    params = SamplingParams(temperature=0.0, num_logprobs=2, logprob_token_ids=(7, second, 9, third))
    [token] = sample(logits, [(0, SampleTask(params, 1, len(PROMPT), PROMPT, []))])
    others = sorted({7, 9, third} - {first, second}, key=lambda token_id: -float(expected[token_id]))
    assert [token_id for token_id, _ in token.top_logprobs] == [first, second, *others]
    for token_id, logprob in token.top_logprobs:
        assert logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
