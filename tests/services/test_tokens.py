"""Whole requests over real sessions and transfers: the tokens are those of one engine that does it all."""

import asyncio
from typing import Any

import pytest

from baton.core.stopping import FinishReason
from tests.services.cluster import Limits, cluster, until
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of


@pytest.mark.parametrize("block_size", [4, 16])
async def test_every_prompt_length_gives_the_tokens_of_one_engine(block_size: int) -> None:
    limits = Limits(layout=fake_layout(block_size))
    async with cluster(limits, limits) as running:
        for length in (1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100):
            settings: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 99})
            for sampling in settings:
                request = running.request(prompt_of(length, length), **sampling)
                answer = await running.ask(request)
                assert answer.outcomes == expected(request.token_ids, request.sampling), length
        await running.all_clean()


async def test_a_seed_decides_and_greedy_ignores_it() -> None:
    async with cluster() as running:
        prompt = prompt_of(9)
        asked: list[dict[str, Any]] = [
            {"seed": 1},
            {"seed": 1},
            {"seed": 2},
            {"seed": 1, "temperature": 0.0},
            {"seed": 2, "temperature": 0.0},
        ]
        answers = [(await running.ask(running.request(prompt, **sampling))).tokens for sampling in asked]
        assert answers[0] == answers[1] != answers[2]
        assert answers[3] == answers[4] != answers[0]


async def test_32_requests_at_once() -> None:
    async with cluster() as running:
        requests = [
            running.request(prompt_of(1 + 3 * index, index), seed=index, max_tokens=1 + index % 12)
            for index in range(32)
        ]
        answers = await asyncio.gather(*map(running.ask, requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_a_known_prefix_does_not_travel_again() -> None:
    async with cluster() as running:
        shared, block = prompt_of(32), running.decode.limits.layout.bytes_per_block
        moved = []
        for tail in ((), (1, 2, 3), (4, 5, 6)):
            before = running.decode.service._stats.num_bytes
            request = running.request((*shared, *tail))
            answer = await running.ask(request)
            assert answer.outcomes == expected(request.token_ids, request.sampling)
            moved.append((running.decode.service._stats.num_bytes - before) // block)
            cached = answer.num_cached
        assert moved == [8, 1, 1]
        assert cached == 32
        await running.all_clean()


async def test_a_prompt_that_decode_knows_whole_moves_nothing() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(32))
        await running.ask(request)
        before = running.decode.service._stats.num_bytes
        again = running.request(prompt_of(32))
        assert (await running.ask(again)).outcomes == expected(request.token_ids, request.sampling)
        assert running.decode.service._stats.num_bytes == before
        await running.all_clean()


async def test_cache_salts_separate() -> None:
    async with cluster() as running:
        prompt, block = prompt_of(33), running.decode.limits.layout.bytes_per_block
        answers = [await running.ask(running.request(prompt, salt=salt)) for salt in ("a", "b", "a")]
        assert [answer.num_cached for answer in answers] == [0, 0, 32]
        assert all(answer.tokens == answers[0].tokens for answer in answers)
        assert running.decode.service._stats.num_bytes == (9 + 9 + 1) * block


@pytest.mark.parametrize("length", [3, 8, 41])
async def test_choices_share_the_prompt_that_travels_once(length: int) -> None:
    async with cluster() as running:
        request = running.request(prompt_of(length), n=3, seed=5)
        answer = await running.ask(request)
        assert answer.outcomes == expected(request.token_ids, request.sampling)
        assert len({tuple(tokens) for tokens in answer.tokens}) == 3
        layout = running.decode.limits.layout
        assert running.decode.service._stats.num_bytes == layout.blocks_for(length) * layout.bytes_per_block
        await running.all_clean()


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_one_token_moves_no_page_and_reserves_none(num_choices: int) -> None:
    async with cluster() as running:
        request = running.request(prompt_of(20), max_tokens=1, n=num_choices)
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        assert running.prefill.service._stats.num_bytes == 0
        assert running.prefill.service._stats.outcomes == {}
        assert running.decode.host.load.prefix_cache_queries == 0
        await running.all_clean()


async def test_a_stop_token_as_the_first_token_withdraws_the_transfer() -> None:
    async with cluster() as running:
        prompt = prompt_of(6)
        probe = running.request(prompt)
        [(tokens, _)] = expected(prompt, probe.sampling)
        request = running.request(prompt, stop_token_ids=(tokens[0],))
        answer = await running.ask(request)
        assert answer.outcomes == [([tokens[0]], FinishReason.STOP)]
        await running.all_clean()
        # The first of two layers of two pages left before the token was sampled.
        layout = running.decode.limits.layout
        assert running.decode.service._stats.num_bytes == 2 * layout.bytes_per_layer
        assert running.decode.service._stats.outcomes == {"withdrawn": 1}
        await until(lambda: running.prefill.service._stats.outcomes == {"withdrawn": 1})


@pytest.mark.parametrize("ended", [0, 1])
async def test_a_choice_that_its_first_token_ends_does_not_hold_up_the_other(ended: int) -> None:
    async with cluster() as running:
        prompt = prompt_of(11)
        probe = running.request(prompt, n=2, seed=3)
        stop = expected(prompt, probe.sampling)[ended][0][0]
        request = running.request(prompt, n=2, seed=3, stop_token_ids=(stop,))
        computed = running.decode.record_choices()
        answer = await running.ask(request)
        assert computed == {1 - ended}
        assert answer.outcomes == expected(prompt, request.sampling)
        assert answer.outcomes[ended] == ([stop], FinishReason.STOP)
        assert len(answer.tokens[1 - ended]) == 8
        await running.all_clean()


async def test_the_models_length_ends_a_request() -> None:
    short = Limits(max_model_len=40)
    async with cluster(short, short) as running:
        request = running.request(prompt_of(37), max_tokens=30)
        answer = await running.ask(request)
        assert answer.outcomes == expected(request.token_ids, request.sampling, max_model_len=40)
        assert answer.reasons == [FinishReason.LENGTH]
        last = running.request(prompt_of(39), max_tokens=30)
        assert len((await running.ask(last)).tokens[0]) == 1
        await running.all_clean()


async def test_a_prefill_server_with_a_longer_limit_than_decode_does_no_harm() -> None:
    async with cluster(Limits(max_model_len=80), Limits(max_model_len=40)) as running:
        request = running.request(prompt_of(39), max_tokens=1)
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        long = running.request(prompt_of(38), max_tokens=2)
        assert (await running.ask(long)).outcomes == expected(long.token_ids, long.sampling)
        await running.all_clean()
