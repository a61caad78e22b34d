"""Workers of both roles alone: a request stays where its prompt was computed, and no page travels."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from baton.core.errors import RequestFailed, Unavailable, WorkerLost
from baton.core.stopping import FinishReason
from tests.services.cluster import Cluster, Limits, cluster, until
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of

ALONE: dict[str, Any] = {"num_prefills": 0, "num_decodes": 0, "num_boths": 1}
POISON = 29_999


@pytest.fixture
async def running() -> AsyncIterator[Cluster]:
    async with cluster(**ALONE) as made:
        yield made
        await made.all_clean()


def num_local(running: Cluster) -> int:
    """Requests that stayed; asserts that nothing else was carried anywhere."""
    for worker in running.boths:
        assert set(worker.stats.transports) <= {"local"}
        assert worker.stats.num_bytes == 0
        assert worker.stats.outcomes == {}
    return sum(worker.stats.transports["local"].num_transfers for worker in running.boths)


async def answers_right(running: Cluster, *requests: Any) -> None:
    answers = await asyncio.gather(*map(running.ask, requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.outcomes == expected(request.token_ids, request.sampling)


async def drop_choice(running: Cluster, request: Any, choice: int) -> None:
    """Drop one of two choices, and wait until the worker knows."""
    running.backend.abort_choice(request.request_id, choice)
    handover = running.both.decode_role._handover
    await until(lambda: handover._open_choices == {request.request_id: {1 - choice}})


# --- tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 99, "n": 3}])
async def test_every_prompt_length_gives_the_tokens_of_one_engine(
    block_size: int, sampling: dict[str, Any]
) -> None:
    async with cluster(both=Limits(layout=fake_layout(block_size)), **ALONE) as running:
        for length in (1, 3, 4, 5, 15, 16, 17, 31, 33, 64, 100):
            await answers_right(running, running.request(prompt_of(length, length), **sampling))
        assert num_local(running) == 11
        await running.all_clean()


async def test_32_requests_at_once(running: Cluster) -> None:
    requests = [
        running.request(
            prompt_of(1 + 3 * index, index), seed=index, n=1 + index % 3, max_tokens=1 + index % 9
        )
        for index in range(32)
    ]
    await answers_right(running, *requests)
    assert num_local(running) == sum(request.sampling.max_tokens > 1 for request in requests)


async def test_one_token_is_the_end_of_it(running: Cluster) -> None:
    await answers_right(running, running.request(prompt_of(21), max_tokens=1, n=3, seed=4))
    assert num_local(running) == 0


@pytest.mark.parametrize("ended", [0, 1, 2])
@pytest.mark.parametrize("position", [0, 3])
async def test_a_stop_token_ends_its_choice_alone(running: Cluster, ended: int, position: int) -> None:
    prompt = prompt_of(11)
    stop = expected(prompt, running.request(prompt, n=3, seed=3).sampling)[ended][0][position]
    request = running.request(prompt, n=3, seed=3, stop_token_ids=(stop,))
    answer = await running.ask(request)
    assert answer.outcomes == expected(prompt, request.sampling)
    assert len(answer.tokens[ended]) == position + 1
    assert answer.reasons.count(FinishReason.STOP) == 1


async def test_the_next_request_finds_prompt_and_answer_in_the_prefix_cache(running: Cluster) -> None:
    first = await running.ask(running.request(prompt_of(32), max_tokens=9))
    again = running.request((*prompt_of(32), *first.tokens[0]))
    answer = await running.ask(again)
    assert (first.num_cached, answer.num_cached) == (0, 40)
    assert answer.outcomes == expected(again.token_ids, again.sampling)


async def test_preemptions_change_no_token() -> None:
    small = Limits(num_blocks=24, max_num_seqs=8, max_model_len=90)
    async with cluster(both=small, **ALONE) as running:
        requests = [
            running.request(prompt_of(10 + index, salt=index), seed=index, max_tokens=40, n=1 + index % 2)
            for index in range(12)
        ]
        await answers_right(running, *requests)
        assert running.both.host.load.num_preemptions > 0
        await running.all_clean()


async def test_two_workers_share_the_requests() -> None:
    async with cluster(**{**ALONE, "num_boths": 2}) as running:
        await answers_right(running, *(running.request(prompt_of(20 + salt, salt)) for salt in range(12)))
        assert num_local(running) == 12
        assert all(worker.stats.transports["local"].num_transfers > 0 for worker in running.boths)
        await running.all_clean()


# --- clients that go ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 8])
async def test_a_client_that_leaves_while_the_prompt_is_computed(running: Cluster, max_tokens: int) -> None:
    running.both.hold()
    request = running.request(prompt_of(60), n=2, max_tokens=max_tokens)
    task = asyncio.create_task(running.ask(request))
    await running.both.is_held()
    task.cancel()
    await asyncio.wait((task,))
    running.both.let_go()
    await running.all_clean()
    await answers_right(running, running.request(prompt_of(50, salt=7)))


async def test_a_client_that_leaves_in_mid_answer(running: Cluster) -> None:
    deltas = running.backend.generate(running.request(prompt_of(20), n=2, max_tokens=400))
    for _ in range(5):
        await anext(deltas)
    await deltas.aclose()
    await running.all_clean()


@pytest.mark.parametrize("dropped", [0, 1])
async def test_a_choice_dropped_before_its_first_token(running: Cluster, dropped: int) -> None:
    running.both.hold()
    request = running.request(prompt_of(40), n=2, max_tokens=12)
    task = asyncio.create_task(running.ask(request))
    await running.both.is_held()
    computed = running.both.record_choices()
    await drop_choice(running, request, dropped)
    running.both.let_go()
    answer = await task
    assert answer.outcomes[1 - dropped] == expected(request.token_ids, request.sampling)[1 - dropped]
    assert answer.outcomes[dropped] == ([], None)
    assert computed == {1 - dropped}


async def test_every_choice_dropped_before_the_first_token(running: Cluster) -> None:
    running.both.hold()
    request = running.request(prompt_of(40), n=2)
    task = asyncio.create_task(running.ask(request))
    await running.both.is_held()
    for choice in range(2):
        running.backend.abort_choice(request.request_id, choice)
    assert (await task).tokens == [[], []]
    running.both.let_go()


async def test_a_choice_dropped_while_it_decodes(running: Cluster) -> None:
    request = running.request(prompt_of(20), n=2, max_tokens=60)
    tokens: list[list[int]] = [[], []]
    async for delta in running.backend.generate(request):
        tokens[delta.choice] += [token.token_id for token in delta.tokens]
        if delta.choice == 0 and len(tokens[0]) == 5:
            running.backend.abort_choice(request.request_id, 0)
    assert len(tokens[0]) == 5
    assert tokens[1] == expected(request.token_ids, request.sampling)[1][0]


@pytest.mark.parametrize("round_", range(4))
async def test_many_that_leave_at_random_moments(round_: int) -> None:
    async with cluster(both=Limits(num_blocks=40, max_num_seqs=8), **ALONE) as running:
        requests = [
            running.request(prompt_of(5 + 11 * index, salt=index), n=1 + index % 2, max_tokens=20)
            for index in range(10)
        ]
        tasks = [asyncio.create_task(running.ask(request)) for request in requests]
        for index, task in enumerate(tasks):
            for _ in range(3 * round_ + index):
                await asyncio.sleep(0)
            if index % 2:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            if not isinstance(result, asyncio.CancelledError):
                assert result.outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


# --- what breaks, and what is counted ----------------------------------------------------------------


async def test_a_worker_that_dies_in_mid_answer_and_comes_back(running: Cluster) -> None:
    deltas = running.backend.generate(running.request(prompt_of(20), max_tokens=480))
    await anext(deltas)
    await running.both.stop()
    started = time.monotonic()
    with pytest.raises(WorkerLost, match="The worker of both roles was lost"):
        async for _ in deltas:
            pass
    assert time.monotonic() - started < 2
    with pytest.raises(Unavailable, match="No worker is connected"):
        await running.ask(running.request(prompt_of(5)))
    await running.both.start()
    await running.connected()
    await answers_right(running, running.request(prompt_of(20)))


async def test_what_hung_on_a_router_ends_with_it(running: Cluster) -> None:
    running.both.hold()
    tasks = [asyncio.create_task(running.ask(running.request(prompt_of(20), n=2))) for _ in range(3)]
    await running.both.is_held()
    await running.stop_router()
    running.both.let_go()
    await until(lambda: not running.both.leftovers)
    for task in tasks:
        task.cancel()
    await running.start_router()
    await running.connected()


async def test_a_draining_worker_ends_what_it_has_and_gets_nothing_new(running: Cluster) -> None:
    running.both.hold()
    request = running.request(prompt_of(20))
    task = asyncio.create_task(running.ask(request))
    await running.both.is_held()
    drain = asyncio.create_task(running.both.sessions.drain(5.0))
    await until(lambda: not running.backend.is_ready)
    running.both.let_go()
    assert (await task).outcomes == expected(request.token_ids, request.sampling)
    assert await drain is True


async def test_a_failed_step_costs_only_its_own_requests(running: Cluster) -> None:
    bad = running.request(prompt_of(9))
    running.both.engine.runner.poison = POISON
    with pytest.raises(RequestFailed, match="poisoned"):
        await running.ask(running.request((*prompt_of(30, salt=9), POISON)))
    running.both.engine.runner.poison = expected(bad.token_ids, bad.sampling)[0][0][3]
    with pytest.raises(RequestFailed, match="poisoned"):
        await running.ask(bad)
    await answers_right(running, running.request(prompt_of(10, salt=2)))


@pytest.mark.parametrize("is_one_dropped", [False, True])
async def test_a_prompt_weighs_until_it_is_computed_and_its_choices_until_they_end(
    running: Cluster, is_one_dropped: bool
) -> None:
    running.both.hold()
    request = running.request(prompt_of(20), n=2, max_tokens=400)
    deltas = running.backend.generate(request)
    first = asyncio.create_task(anext(deltas))
    await running.both.is_held()
    if is_one_dropped:
        await drop_choice(running, request, 1)
    worker = running.links[0].worker
    assert worker is not None
    assert (worker.num_in_flight, worker.num_in_flight_tokens) == (2, 20)
    running.both.let_go()
    await first
    while worker.num_in_flight_tokens:
        await anext(deltas)
    assert (worker.num_in_flight, worker.num_in_flight_tokens) == (2, 0)
    await deltas.aclose()


async def test_load_and_metrics(running: Cluster) -> None:
    assert running.pool.capacity == running.both.limits.max_num_seqs
    await answers_right(running, running.request(prompt_of(20)))
    await until(lambda: running.links[0].worker.load.transports)
    [transport] = running.links[0].worker.load.transports
    assert (transport.name, transport.num_transfers, transport.bytes) == ("local", 1, 0)
    assert running.links[0].role_name == "both"
