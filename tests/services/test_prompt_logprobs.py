"""Log probabilities of a prompt over servers: they come before its first token, once, whoever computes it."""

from contextlib import aclosing
from typing import Any

import pytest

from baton import LLM, SamplingParams
from baton.core.sampling import SampledToken
from tests.e2e.processes import DEMO_MODEL
from tests.services.cluster import Cluster, cluster
from tests.services.test_failover import die_without_a_word, num_lost
from tests.services.test_mid_answer import TWO, Client, candidates, silent_after
from tests.services.test_mid_answer_of_a_model import CONFIG, MODEL, PROMPT

APART: dict[str, Any] = {"num_prefills": 1, "num_decodes": 1}


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, float]]:
    with LLM(str(DEMO_MODEL), dtype=CONFIG.dtype, kv_cache_bytes=CONFIG.kv_cache_bytes) as llm:
        [output] = llm.generate(
            [list(PROMPT)], SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False
        )
    assert output.prompt_logprobs is not None
    return [
        (token_id, entry.logprob)
        for found in output.prompt_logprobs[1:]
        for token_id, entry in (found or {}).items()
    ]


def as_pairs(tokens: tuple[SampledToken, ...]) -> list[tuple[int, Any]]:
    return [(token.token_id, pytest.approx(token.logprob, abs=1e-3)) for token in tokens]


@pytest.mark.parametrize("max_tokens", [1, 6])
@pytest.mark.parametrize("roles", [APART, TWO["both"]], ids=["apart", "both"])
async def test_they_come_with_each_choices_first_tokens(
    roles: dict[str, Any], max_tokens: int, expected: list[tuple[int, float]]
) -> None:
    async with cluster(MODEL, MODEL, MODEL, **roles) as running:
        for _ in range(2):  # the second time the prefix caches know the prompt
            request = running.request(
                PROMPT, temperature=1.0, seed=4, n=2, max_tokens=max_tokens, num_prompt_logprobs=0
            )
            seen: dict[int, list[Any]] = {}
            async with aclosing(running.backend.generate(request)) as deltas:
                async for delta in deltas:
                    seen.setdefault(delta.choice, []).append(delta.prompt_logprobs)
            for first, *others in seen.values():
                assert expected == as_pairs(first)
                assert not any(others)


@pytest.mark.parametrize("role", TWO)
async def test_they_come_once_though_a_worker_dies(role: str, expected: list[tuple[int, float]]) -> None:
    async with cluster(MODEL, MODEL, MODEL, **TWO[role]) as running:
        lost = candidates(running)[0]
        silent_after(lost, 3)
        request = running.request(PROMPT, temperature=0.0, max_tokens=12, num_prompt_logprobs=0)
        seen: list[Any] = []
        client = _Watching(running, request, seen)
        await client.has(3 + (role == "decode"))
        await die_without_a_word(lost)
        answer = await client.ends()
        assert len(answer.tokens[0]) == 12
        assert num_lost(running) == 1
        told = [tokens for tokens in seen if tokens]
        assert [expected] == [as_pairs(tokens) for tokens in told]


class _Watching(Client):
    """Notes what comes of the prompt."""

    def __init__(self, running: Cluster, request: Any, seen: list[Any]) -> None:
        self._seen = seen
        super().__init__(running, request)

    async def _read(self) -> None:
        async with aclosing(self._running.backend.generate(self.request)) as deltas:
            async for delta in deltas:
                self._seen.append(delta.prompt_logprobs)
                self.answer.add(delta)
