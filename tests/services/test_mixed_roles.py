"""Prefill servers, decode servers and workers of both roles in one cluster, in every combination."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from baton.core.errors import TransferRefused, Unavailable
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton_router.workers import pool
from baton_router.workers.policy import Placement
from tests.services.cluster import Answer, Cluster, Limits, Worker, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of

# In the router's lists the worker of both roles comes after the server of one.
APART, TO_BOTH, FROM_BOTH, LOCAL = Placement(0, 0), Placement(0, 1), Placement(1, 0), Placement(None, 1)
PLACEMENTS = {"apart": APART, "to both": TO_BOTH, "from both": FROM_BOTH, "local": LOCAL}
MIXED: dict[str, Any] = {"num_prefills": 1, "num_decodes": 1, "num_boths": 1}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 5, "n": 3},
    {"max_tokens": 1},
    {"max_tokens": 1, "n": 2},
]


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let requests be placed so from now on, each in one of some ways."""
    chance = random.Random(1)

    def set_placements(*placements: Placement) -> None:
        monkeypatch.setattr(pool, "place", lambda *_: chance.choice(placements))

    return set_placements


def refuse_commit(worker: Worker, and_then: Callable[[], None] = lambda: None) -> None:
    """Let its next transfer fail at the commit."""
    inbound = worker.decode_role._handover.inbound
    commit = inbound.commit

    def refuse(*_: Any, **__: Any) -> None:
        inbound.commit = commit  # type: ignore[method-assign]
        and_then()
        raise TransferRefused("test", "refused by the test")

    inbound.commit = refuse  # type: ignore[method-assign]


async def answers_right(running: Cluster, *requests: Any) -> None:
    answers = await asyncio.gather(*map(running.ask, requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.outcomes == expected(request.token_ids, request.sampling)


async def placed_requests(running: Cluster, count: int) -> None:
    """Wait until so many requests have been begun on their workers."""
    flights = running.backend._flights
    await until(lambda: sum(bool(flight._attempts) for flight in flights.values()) == count)


def carried(running: Cluster) -> dict[str, tuple[str, ...]]:
    """What each worker's pages went by."""
    return {worker.config.role: tuple(worker.stats.transports) for worker in running.workers}


# --- every combination -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", PLACEMENTS)
async def test_a_pair_gives_the_tokens_of_one_engine(where: str, placed: Callable[..., None]) -> None:
    async with cluster(**MIXED) as running:
        placed(PLACEMENTS[where])
        for salt, sampling in enumerate(SAMPLINGS):
            for length in (1, 4, 17, 70):
                await answers_right(running, running.request(prompt_of(length, 10 * salt), **sampling))
        prompt = prompt_of(11, salt=50)
        [(tokens, _)] = expected(prompt, running.request(prompt).sampling)
        for stop in (tokens[0], tokens[3]):
            await answers_right(running, running.request(prompt, stop_token_ids=(stop,)))
        used = {
            "apart": {"prefill": ("grpc",), "decode": ("grpc",), "both": ()},
            "to both": {"prefill": ("grpc",), "decode": (), "both": ("grpc",)},
            "from both": {"prefill": (), "decode": ("grpc",), "both": ("grpc",)},
            "local": {"prefill": (), "decode": (), "both": ("local",)},
        }
        assert carried(running) == used[where]
        await running.all_clean()


async def test_all_combinations_at_once(placed: Callable[..., None]) -> None:
    async with cluster(both=Limits(num_blocks=64, max_num_seqs=12), **MIXED) as running:
        placed(*PLACEMENTS.values())
        requests = [
            running.request(
                prompt_of(1 + 2 * index, index), seed=index, n=1 + index % 3, max_tokens=1 + index
            )
            for index in range(30)
        ]
        await answers_right(running, *requests)
        assert set(running.both.stats.transports) == {"grpc", "local"}
        await running.all_clean()


@pytest.mark.parametrize("round_", range(6))
async def test_all_combinations_while_clients_go_and_transfers_fail(
    round_: int, placed: Callable[..., None]
) -> None:
    chance = random.Random(round_)
    small = Limits(num_blocks=40, max_num_seqs=8)
    async with cluster(decode=small, both=small, **MIXED) as running:
        placed(*PLACEMENTS.values())
        refuse_commit(running.both)
        refuse_commit(running.decode)
        requests = [
            running.request(prompt_of(5 + 7 * salt, salt), n=1 + salt % 3, max_tokens=20)
            for salt in range(14)
        ]
        tasks = [asyncio.create_task(running.ask(request)) for request in requests]
        for request, task in list(zip(requests, tasks, strict=True))[::3]:
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                task.cancel()
            else:
                running.backend.abort_choice(request.request_id, 0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for index, (request, result) in enumerate(zip(requests, results, strict=True)):
            if isinstance(result, Answer):
                first_whole = 1 if index % 3 == 0 else 0  # choice 0 may have been dropped
                outcomes = expected(request.token_ids, request.sampling)
                assert result.outcomes[first_whole:] == outcomes[first_whole:]
            else:
                assert isinstance(result, asyncio.CancelledError), result
        await running.all_clean()


async def test_the_policy_keeps_requests_local_and_lets_a_prefill_server_help() -> None:
    async with cluster(num_prefills=1, num_decodes=0, num_boths=1) as running:
        await answers_right(running, running.request(prompt_of(9)))
        assert carried(running) == {"prefill": (), "both": ("local",)}
        running.both.hold()
        first, second = (running.request(prompt_of(40, salt)) for salt in (1, 2))
        tasks = [asyncio.create_task(running.ask(request)) for request in (first, second)]
        weights = [link.worker for link in running.links]
        await until(lambda: [worker.num_in_flight_tokens for worker in weights if worker] == [40, 40])
        running.both.let_go()
        for request, task in zip((first, second), tasks, strict=True):
            assert (await task).outcomes == expected(request.token_ids, request.sampling)
        assert carried(running) == {"prefill": ("grpc",), "both": ("local", "grpc")}
        await running.all_clean()


async def test_places_are_counted_once() -> None:
    limits = Limits(max_num_seqs=7)
    async with cluster(decode=Limits(max_num_seqs=5), both=limits, **{**MIXED, "num_boths": 2}) as running:
        assert running.pool.capacity == 5 + 7 + 7


# --- transfers that fail, aborts at the right role ---------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_retry_may_stay_on_one_worker_and_first_tokens_stand(
    num_choices: int, placed: Callable[..., None]
) -> None:
    async with cluster(**MIXED) as running:
        placed(TO_BOTH)
        runner = running.both.engine.runner

        def deviate() -> None:
            placed(LOCAL)
            sample = runner._sample

            def sample_other_first_tokens(row: Any) -> tuple[SampledToken, ...]:
                return tuple(
                    SampledToken(29_998) if task.num_output_tokens == 0 else token
                    for task, token in zip(row.samples, sample(row), strict=True)
                )

            runner._sample = sample_other_first_tokens  # type: ignore[method-assign]

        refuse_commit(running.both, and_then=deviate)
        request = running.request(prompt_of(15), n=num_choices, seed=7, stop_token_ids=(29_998,))
        await answers_right(running, request)
        assert running.both.stats.transports["local"].num_transfers == num_choices
        await running.all_clean()


@pytest.mark.parametrize("ended", [0, 1])
async def test_a_choice_that_has_ended_stays_ended(ended: int, placed: Callable[..., None]) -> None:
    async with cluster(**MIXED) as running:
        placed(TO_BOTH)
        prompt = prompt_of(11)
        stop = expected(prompt, running.request(prompt, n=2, seed=3).sampling)[ended][0][0]
        refuse_commit(running.both, and_then=lambda: placed(LOCAL))
        request = running.request(prompt, n=2, seed=3, stop_token_ids=(stop,))
        answer = await running.ask(request)
        assert answer.outcomes == expected(prompt, request.sampling)
        assert answer.outcomes[ended] == ([stop], FinishReason.STOP)
        await running.all_clean()


@pytest.mark.parametrize("where", PLACEMENTS)
async def test_a_client_that_leaves_while_the_prompt_is_computed(
    where: str, placed: Callable[..., None]
) -> None:
    async with cluster(**MIXED) as running:
        placed(PLACEMENTS[where])
        worker = running.both if where in ("from both", "local") else running.prefill
        worker.hold()
        task = asyncio.create_task(running.ask(running.request(prompt_of(60), n=2)))
        await worker.is_held()
        task.cancel()
        await asyncio.wait((task,))
        worker.let_go()
        await running.all_clean()
        await answers_right(running, running.request(prompt_of(60), n=2))


@pytest.mark.parametrize("where", PLACEMENTS)
async def test_a_choice_dropped_while_the_prompt_is_computed(where: str, placed: Callable[..., None]) -> None:
    async with cluster(**MIXED) as running:
        placed(PLACEMENTS[where])
        worker = running.both if where in ("from both", "local") else running.prefill
        worker.hold()
        request = running.request(prompt_of(40), n=2)
        task = asyncio.create_task(running.ask(request))
        await worker.is_held()
        running.backend.abort_choice(request.request_id, 0)
        worker.let_go()
        answer = await task
        assert answer.outcomes == [([], None), expected(request.token_ids, request.sampling)[1]]
        await running.all_clean()


async def test_a_failed_step_costs_only_the_requests_in_it(placed: Callable[..., None]) -> None:
    """Whichever role they are of."""
    async with cluster(**MIXED) as running:
        running.both.hold()
        running.both.engine.runner.poison = 29_999
        tasks = []
        for salt, placement in enumerate((FROM_BOTH, LOCAL, TO_BOTH)):
            placed(placement)
            request = running.request((*prompt_of(12, salt), 29_999))
            tasks.append(asyncio.create_task(running.ask(request)))
            await placed_requests(running, salt + 1)
        await running.both.is_held()
        running.both.let_go()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert ["poisoned" in str(result) for result in results[:2]] == [True, True]
        assert isinstance(results[2], Answer)  # its prompt was computed elsewhere
        running.both.engine.runner.poison = None
        await running.all_clean()
        await answers_right(running, *(running.request(prompt_of(60, salt)) for salt in range(3)))


@pytest.mark.parametrize("where", ["to both", "from both", "local"])
async def test_a_worker_of_both_roles_dies_and_comes_back(where: str, placed: Callable[..., None]) -> None:
    async with cluster(**MIXED) as running:
        placed(PLACEMENTS[where])
        running.decode.hold()  # so that its request still hangs on both of its workers
        deltas = running.backend.generate(running.request(prompt_of(20), max_tokens=480))
        await anext(deltas)
        await running.both.stop()
        with pytest.raises(Unavailable):  # from whomever the router hears first
            async for _ in deltas:
                pass
        running.decode.let_go()
        await until(lambda: not running.prefill.leftovers and not running.decode.leftovers)
        placed(APART)
        await answers_right(running, running.request(prompt_of(20)))
        await running.both.start()
        await running.connected()
        placed(PLACEMENTS[where])
        await answers_right(running, running.request(prompt_of(20)))
        await running.all_clean()
