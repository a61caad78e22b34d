"""A client that goes away, or drops a choice, at every stage: nothing of it stays on any server."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from baton.core.errors import Unavailable
from baton_router.backend import GenerationRequest, TokenDelta
from tests.services.cluster import Cluster, Limits, Worker, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of


async def begin(running: Cluster, request: GenerationRequest) -> asyncio.Task[object]:
    """Start reading a request's answer."""
    return asyncio.create_task(running.ask(request))


async def leave(task: asyncio.Task[object]) -> None:
    """What the front door does when its client goes."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def hold(worker: Worker) -> None:
    worker.engine.runner.gate.clear()


def let_go(worker: Worker) -> None:
    worker.engine.runner.gate.set()


async def still_works(running: Cluster) -> None:
    """Pages that an aborted request wrote in vain must not show in another one's answer."""
    request = running.request(prompt_of(50, salt=77))
    assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
    await running.all_clean()


async def test_while_prefill_computes() -> None:
    async with cluster() as running:
        hold(running.prefill)
        task = await begin(running, running.request(prompt_of(60)))
        await until(running.prefill.engine.runner.is_held.is_set)
        await leave(task)
        let_go(running.prefill)
        await running.all_clean()
        await still_works(running)


async def test_while_pages_travel() -> None:
    async with cluster() as running:
        runner = running.prefill.engine.runner
        task = await begin(running, running.request(prompt_of(60)))
        await until(lambda: len(running.decode.service._handover.table) == 1)
        # Half of the prompt has arrived: hold prefill's next step.
        await until(lambda: running.decode.service._stats.num_bytes or task.done())
        runner.gate.clear()
        await leave(task)
        runner.gate.set()
        await running.all_clean()
        await still_works(running)


async def test_while_a_known_part_of_the_pages_has_arrived() -> None:
    async with cluster(prefill=Limits(max_num_batched_tokens=8)) as running:
        runner, original = running.prefill.engine.runner, running.prefill.engine.runner.run

        def run_two_steps(plan: Any, layers_done: Any) -> Any:
            if runner.num_steps == 2:
                runner.gate.clear()
            return original(plan, layers_done)

        setattr(runner, "run", run_two_steps)  # noqa: B010 - a method, to type checkers
        task = await begin(running, running.request(prompt_of(60)))
        await until(lambda: running.decode.service._stats.num_bytes == 4 * 64 * 2)
        await until(runner.is_held.is_set)
        await leave(task)
        runner.num_steps = 3
        runner.gate.set()
        await running.all_clean()
        assert running.decode.service._stats.outcomes["aborted"] == 1
        await until(lambda: running.prefill.service._stats.outcomes == {"aborted": 1})
        await still_works(running)


async def test_while_decode_runs() -> None:
    async with cluster() as running:
        deltas: AsyncGenerator[TokenDelta] = running.backend.generate(
            running.request(prompt_of(20), max_tokens=400)
        )
        async with aclosing(deltas):
            num_tokens = 0
            async for delta in deltas:
                num_tokens += len(delta.tokens)
                if num_tokens > 5:
                    break
        await running.all_clean()
        await still_works(running)


async def test_while_it_waits_in_the_routers_queue() -> None:
    async with cluster(decode=Limits(max_num_seqs=1)) as running:
        hold(running.prefill)
        first = await begin(running, running.request(prompt_of(20)))
        second = await begin(running, running.request(prompt_of(21)))
        await until(lambda: running.admission.num_waiting == 1)
        await leave(second)
        assert running.admission.num_waiting == 0
        let_go(running.prefill)
        await first
        await running.all_clean()


async def test_while_its_reservation_waits_for_pages() -> None:
    async with cluster(decode=Limits(num_blocks=16)) as running:
        hold(running.prefill)
        first = await begin(running, running.request(prompt_of(48)))
        await until(lambda: len(running.decode.service._handover.table) == 1)
        second = await begin(running, running.request(prompt_of(48, salt=1)))
        await until(lambda: running.decode.host.load.num_waiting == 1)
        await leave(second)
        await until(lambda: running.decode.host.load.num_waiting == 0)
        let_go(running.prefill)
        await first
        await running.all_clean()


async def test_while_the_ticket_is_on_its_way() -> None:
    """The abort reaches decode after the engine has granted the pages, and before the ticket is issued."""
    async with cluster() as running:
        service = running.decode.service
        receive = running.decode.host._on_output
        assert receive is not None
        held: list[Any] = []
        running.decode.host._on_output = held.append
        task = await begin(running, running.request(prompt_of(20)))
        await until(lambda: any(output.reserved for output in held))
        await leave(task)
        await until(lambda: not service.sessions._requests)
        running.decode.host._on_output = receive
        for output in held:
            receive(output)
        assert len(service._handover.table) == 0
        await running.all_clean()


@pytest.mark.parametrize("round_", range(8))
async def test_many_at_random_moments(round_: int) -> None:
    async with cluster(decode=Limits(num_blocks=40, max_num_seqs=8)) as running:
        requests = [
            running.request(prompt_of(5 + 11 * index, salt=index), n=1 + index % 2, max_tokens=20)
            for index in range(10)
        ]
        tasks = [await begin(running, request) for request in requests]
        for index, task in enumerate(tasks):
            # Stages differ with the number of turns that the event loop has had.
            for _ in range(3 * round_ + index):
                await asyncio.sleep(0)
            if index % 2:
                task.cancel()
        results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        for index, (request, result) in enumerate(zip(requests, results, strict=True)):
            if not (index % 2 and isinstance(result, asyncio.CancelledError)):
                assert result.outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_a_choice_dropped_before_the_commit() -> None:
    async with cluster() as running:
        hold(running.prefill)
        request = running.request(prompt_of(20), n=2, max_tokens=12)
        deltas = running.backend.generate(request)
        first = asyncio.create_task(anext(deltas))
        await until(running.prefill.engine.runner.is_held.is_set)
        running.backend.abort_choice(request.request_id, 0)
        await until(lambda: running.decode.service._handover._cut_choices)
        computed = running.decode.record_choices()
        let_go(running.prefill)
        tokens = [token.token_id for token in (await first).tokens]
        async for delta in deltas:
            assert delta.choice == 1
            tokens += [token.token_id for token in delta.tokens]
        assert tokens == expected(request.token_ids, request.sampling)[1][0]
        assert computed == {1}
        await running.all_clean()


async def test_every_choice_dropped_before_the_commit() -> None:
    async with cluster() as running:
        hold(running.prefill)
        request = running.request(prompt_of(20), n=2)
        task = await begin(running, request)
        await until(running.prefill.engine.runner.is_held.is_set)
        running.backend.abort_choice(request.request_id, 0)
        running.backend.abort_choice(request.request_id, 1)
        answer = await task
        assert answer.tokens == [[], []]  # type: ignore[attr-defined]
        let_go(running.prefill)
        await running.all_clean()


async def test_every_choice_dropped_while_the_reservation_waits() -> None:
    async with cluster(decode=Limits(num_blocks=16)) as running:
        hold(running.prefill)
        first = await begin(running, running.request(prompt_of(48)))
        await until(lambda: len(running.decode.service._handover.table) == 1)
        request = running.request(prompt_of(48, salt=1))
        second = await begin(running, request)
        await until(lambda: running.decode.host.load.num_waiting == 1)
        running.backend.abort_choice(request.request_id, 0)
        await second
        let_go(running.prefill)
        await first
        await running.all_clean()


async def test_a_choice_dropped_while_it_decodes() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(20), n=2, max_tokens=60)
        tokens: list[list[int]] = [[], []]
        async for delta in running.backend.generate(request):
            tokens[delta.choice] += [token.token_id for token in delta.tokens]
            if delta.choice == 0 and len(tokens[0]) == 5:
                running.backend.abort_choice(request.request_id, 0)
        [(_, _), (other, _)] = expected(request.token_ids, request.sampling)
        assert len(tokens[0]) == 5
        assert tokens[1] == other
        await running.all_clean()


async def test_all_at_once_as_the_router_stops() -> None:
    limits = Limits(max_num_seqs=1)
    async with cluster(prefill=limits, decode=limits) as running:
        tasks = [await begin(running, running.request(prompt_of(20), max_tokens=400)) for _ in range(3)]
        await until(lambda: running.admission.num_waiting == 2)
        running.backend.end_all(Unavailable("stopping"))
        for task in tasks:
            with pytest.raises(Unavailable, match="stopping"):
                await task
        with pytest.raises(Unavailable, match="stopping"):
            await running.ask(running.request(prompt_of(5)))
        await running.all_clean()
