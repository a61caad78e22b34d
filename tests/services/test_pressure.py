"""Too few pages, failing steps, ids used twice: nobody pays for another one's request."""

import asyncio

import pytest

from baton.core.errors import InvalidRequest, RequestFailed, Unavailable, WorkerLost
from baton.core.reservation import FramePlace, TransferDeadlines
from tests.services.cluster import Limits, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of

POISON = 29_999


async def test_preemptions_and_queued_reservations_change_no_token() -> None:
    small = Limits(num_blocks=24, max_num_seqs=8, max_model_len=90)
    async with cluster(small, small) as running:
        requests = [
            running.request(prompt_of(10 + index, salt=index), seed=index, max_tokens=40, n=1 + index % 2)
            for index in range(12)
        ]
        answers = await asyncio.gather(*map(running.ask, requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.outcomes == expected(request.token_ids, request.sampling, 90)
        assert running.decode.host.load.num_preemptions > 0
        await running.all_clean()


async def test_a_failed_step_on_prefill_costs_only_its_own_requests() -> None:
    async with cluster(prefill=Limits(max_num_batched_tokens=8)) as running:
        running.prefill.engine.runner.poison = POISON
        good = [running.request(prompt_of(30, salt)) for salt in range(3)]
        # The poison is in the last chunk: pages have left by then.
        bad = running.request((*prompt_of(30, salt=9), POISON))
        tasks = [asyncio.create_task(running.ask(request)) for request in (good[0], bad, *good[1:])]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failure = results.pop(1)
        assert isinstance(failure, RequestFailed)
        assert "poisoned" in str(failure)
        failed = [result for result in results if isinstance(result, RequestFailed)]
        assert len(failed) <= 1  # whose rows shared the step
        for request, result in zip(good, results, strict=True):
            if result not in failed:
                assert result.outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_a_failed_step_on_decode_costs_only_its_own_requests() -> None:
    async with cluster() as running:
        bad = running.request(prompt_of(9))
        running.decode.engine.runner.poison = expected(bad.token_ids, bad.sampling)[0][0][3]
        with pytest.raises(RequestFailed, match="poisoned"):
            await running.ask(bad)
        good = running.request(prompt_of(10, salt=2))
        assert (await running.ask(good)).outcomes == expected(good.token_ids, good.sampling)
        await running.all_clean()


async def test_what_finished_before_an_error_stays_finished() -> None:
    """Tokens and the error of a later event may reach the router in one turn of its loop."""
    async with cluster() as running:
        request = running.request(prompt_of(9), max_tokens=2)
        link = running.links[1]
        dispatch = link._dispatch

        def dispatch_then_fail(event, on_change):
            dispatch(event, on_change)
            if event.step_output.finished:
                for errand in link._errands.values():
                    errand.inbox.put(RequestFailed("too late to matter"))

        link._dispatch = dispatch_then_fail  # type: ignore[method-assign]
        answer = await running.ask(request)
        assert answer.outcomes == expected(request.token_ids, request.sampling)


async def test_a_request_id_in_use_is_refused_and_its_owner_goes_on() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(20), max_tokens=60)
        first = running.backend.generate(request)
        tokens = [token.token_id for token in (await anext(first)).tokens]
        with pytest.raises(InvalidRequest, match="in use"):
            await running.ask(request)
        async for delta in first:
            tokens += [token.token_id for token in delta.tokens]
        assert tokens == expected(request.token_ids, request.sampling)[0][0]
        await running.all_clean()


async def test_a_prompt_that_no_worker_takes_is_invalid() -> None:
    async with cluster() as running:
        with pytest.raises(InvalidRequest, match="The prompt has 600 tokens"):
            await running.ask(running.request(prompt_of(600)))
        with pytest.raises(InvalidRequest, match="n is 100"):
            await running.ask(running.request(prompt_of(6), n=100))
        await running.all_clean()


async def test_an_engine_that_breaks_ends_its_server() -> None:
    async with cluster() as running:
        running.decode.host._engine._scheduler.schedule = lambda: 1 // 0  # type: ignore[method-assign,assignment,return-value]
        task = asyncio.create_task(running.ask(running.request(prompt_of(9))))
        server, running.decode._task = running.decode._task, None
        assert server is not None
        with pytest.raises(ExceptionGroup) as caught:
            await server
        [error] = caught.value.exceptions
        assert isinstance(error, RequestFailed)
        assert "ZeroDivisionError" in str(error)
        with pytest.raises(WorkerLost):
            await task


@pytest.mark.parametrize(
    "deadlines",
    [
        TransferDeadlines(reserved_s=0.05, receiving_s=60.0, aborting_s=60.0),
        TransferDeadlines(reserved_s=60.0, receiving_s=0.05, aborting_s=0.05),
    ],
)
async def test_a_prefill_server_that_hangs_costs_the_request_its_deadline_and_no_page(
    deadlines: TransferDeadlines,
) -> None:
    async with cluster(decode=Limits(deadlines=deadlines)) as running:
        running.prefill.engine.runner.gate.clear()
        if deadlines.reserved_s < 1:  # the prefill server does not even open its transfer
            running.prefill.service.sender.begin = lambda *_: SilentTransfer()
        with pytest.raises(Unavailable, match="KV transfer"):
            await running.ask(running.request(prompt_of(60)))
        await until(lambda: not running.decode.leftovers)
        assert running.decode.service._stats.outcomes["deadline"] >= 1
        running.prefill.engine.runner.gate.set()
        if deadlines.reserved_s > 1:
            await running.all_clean()


class SilentTransfer:
    """A transfer that never begins."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    first_block = 0

    def send_pages(self, place: FramePlace, blocks: tuple[int, ...]) -> None: ...

    def withdraw(self) -> None: ...

    def commit(self, first_tokens: list[int], finished_choices: list[int]) -> None: ...
