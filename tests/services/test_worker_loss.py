"""Workers that die, come back, come late, drain, or are not what the router wants."""

import asyncio
import logging
import time

import pytest

from baton.core.errors import Overloaded, Unavailable, WorkerLost
from tests.services.cluster import Limits, cluster, until
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of


async def test_a_decode_server_that_dies_mid_stream_and_comes_back() -> None:
    async with cluster() as running:
        deltas = running.backend.generate(running.request(prompt_of(20), max_tokens=480))
        for _ in range(2):  # the second comes from decode
            await anext(deltas)
        await running.decode.stop()
        started = time.monotonic()
        with pytest.raises(WorkerLost):
            async for _ in deltas:
                pass
        assert time.monotonic() - started < 2
        with pytest.raises(Unavailable, match="No decode server"):
            await running.ask(running.request(prompt_of(5)))
        await until(lambda: not running.prefill.leftovers)
        await running.decode.start()
        await running.connected()
        request = running.request(prompt_of(20))
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_a_decode_server_that_dies_while_it_receives() -> None:
    async with cluster() as running:
        running.prefill.engine.runner.gate.clear()
        task = asyncio.create_task(running.ask(running.request(prompt_of(60))))
        await until(running.prefill.engine.runner.is_held.is_set)
        await running.decode.stop()
        with pytest.raises(Unavailable):
            await task
        running.prefill.engine.runner.gate.set()
        await until(lambda: not running.prefill.leftovers)
        await running.decode.start()
        await running.connected()
        request = running.request(prompt_of(60))
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_requests_find_a_decode_server_that_is_just_back() -> None:
    """Prefill's own connection must not remember that the server was away."""
    async with cluster() as running:
        await running.ask(running.request(prompt_of(5)))
        for salt in range(3):
            await running.decode.stop()
            await until(lambda: running.links[1].worker is None)
            await running.decode.start()
            await running.connected()
            request = running.request(prompt_of(20, salt))
            assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)


async def test_a_prefill_server_that_dies_mid_prompt_and_comes_back() -> None:
    async with cluster() as running:
        running.prefill.engine.runner.gate.clear()
        task = asyncio.create_task(running.ask(running.request(prompt_of(60))))
        await until(running.prefill.engine.runner.is_held.is_set)
        await running.prefill.stop()
        with pytest.raises(Unavailable):
            await task
        await until(lambda: not running.decode.leftovers)
        await running.prefill.start()
        await running.connected()
        request = running.request(prompt_of(60))
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_requests_that_decode_outlive_their_prefill_server() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(20), max_tokens=200)
        tokens: list[int] = []
        async for delta in running.backend.generate(request):
            if len(tokens) < 2 <= len(tokens) + len(delta.tokens):
                running.decode.engine.runner.gate.clear()
                await running.prefill.stop()
                await until(lambda: running.links[0].worker is None)
                running.decode.engine.runner.gate.set()
            tokens += [token.token_id for token in delta.tokens]
        assert tokens == expected(request.token_ids, request.sampling)[0][0]
        await running.all_clean()


async def test_prefill_load_counts_prompts_under_way_and_no_others() -> None:
    async with cluster(num_prefills=2) as running:
        for worker in running.prefills:
            worker.engine.runner.gate.clear()
        tasks = [asyncio.create_task(running.ask(running.request(prompt_of(20, salt)))) for salt in range(4)]
        await until(lambda: all(len(worker.service._handover._prompts) == 2 for worker in running.prefills))
        for worker in running.prefills:
            worker.engine.runner.gate.set()
        await asyncio.gather(*tasks)
        await running.all_clean()
        deltas = running.backend.generate(running.request(prompt_of(20), max_tokens=480))
        async for delta in deltas:
            if delta.tokens and running.links[0].worker.num_in_flight_tokens == 0:
                break
        await deltas.aclose()
        await running.all_clean()


async def test_workers_that_start_late() -> None:
    async with cluster(start=False) as running:
        with pytest.raises(Unavailable, match="No prefill server"):
            await running.ask(running.request(prompt_of(5)))
        await running.prefill.start()
        await until(lambda: running.links[0].worker is not None)
        with pytest.raises(Unavailable, match="No decode server"):
            await running.ask(running.request(prompt_of(5)))
        assert not running.backend.is_ready
        await running.decode.start()
        await until(lambda: running.backend.is_ready)
        request = running.request(prompt_of(5))
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_draining_worker_ends_what_it_has_and_gets_nothing_new(role: str) -> None:
    async with cluster() as running:
        worker = running.prefill if role == "prefill" else running.decode
        worker.engine.runner.gate.clear()
        request = running.request(prompt_of(20))
        task = asyncio.create_task(running.ask(request))
        await until(worker.engine.runner.is_held.is_set)
        drain = asyncio.create_task(worker.service.sessions.drain(5.0))
        await until(lambda: not running.backend.is_ready)
        with pytest.raises(Unavailable, match=f"No {role} server"):
            await running.ask(running.request(prompt_of(5)))
        worker.engine.runner.gate.set()
        assert (await task).outcomes == expected(request.token_ids, request.sampling)
        assert await drain is True
        await running.all_clean()


async def test_a_router_that_connects_to_a_draining_worker_is_told() -> None:
    async with cluster() as running:
        running.decode.engine.runner.gate.clear()
        task = asyncio.create_task(running.ask(running.request(prompt_of(20))))
        await until(running.decode.engine.runner.is_held.is_set)
        drain = asyncio.create_task(running.decode.service.sessions.drain(0.3))
        await until(lambda: not running.backend.is_ready)
        await running.stop_router()
        await until(lambda: not running.decode.service.sessions._sessions)
        task.cancel()
        await running.start_router()
        await running.connected()
        await until(lambda: running.pool.decodes[0].worker.is_draining)
        assert not running.backend.is_ready
        running.decode.engine.runner.gate.set()
        await drain


async def test_those_who_queue_are_told_when_the_workers_go() -> None:
    async with cluster(decode=Limits(max_num_seqs=1)) as running:
        running.prefill.engine.runner.gate.clear()
        tasks = [asyncio.create_task(running.ask(running.request(prompt_of(9)))) for _ in range(3)]
        await until(lambda: running.admission.num_waiting == 2)
        await running.decode.stop()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [WorkerLost, Unavailable, Unavailable]


async def test_a_full_queue_refuses() -> None:
    async with cluster(decode=Limits(max_num_seqs=1), max_queue=1) as running:
        running.prefill.engine.runner.gate.clear()
        tasks = [asyncio.create_task(running.ask(running.request(prompt_of(9)))) for _ in range(2)]
        await until(lambda: running.admission.num_waiting == 1)
        with pytest.raises(Overloaded, match="queue is full"):
            await running.ask(running.request(prompt_of(9)))
        running.prefill.engine.runner.gate.set()
        await asyncio.gather(*tasks)
        await running.all_clean()


async def test_what_hung_on_a_router_ends_with_it() -> None:
    async with cluster() as running:
        running.decode.engine.runner.gate.clear()
        tasks = [
            asyncio.create_task(running.ask(running.request(prompt_of(20 + salt, salt), n=2)))
            for salt in range(4)
        ]
        await until(running.decode.engine.runner.is_held.is_set)
        await running.stop_router()
        running.decode.engine.runner.gate.set()
        await until(lambda: not running.decode.leftovers and not running.prefill.leftovers)
        assert running.decode.service.sessions._sessions == []
        for task in tasks:
            task.cancel()
        await running.start_router()
        await running.connected()


@pytest.mark.parametrize(
    ("limits", "swapped", "reason"),
    [
        (Limits(fingerprint=bytes(32)), False, "it serves another model than this router"),
        (Limits(), True, "it is no decode server"),
    ],
)
async def test_a_worker_that_does_not_fit_is_not_used_and_the_log_says_why_once(
    limits: Limits, swapped: bool, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with cluster(decode=limits, start=False, swapped=swapped) as running:
        await asyncio.gather(running.prefill.start(), running.decode.start())
        await until(lambda: reason in caplog.text)
        worker_text = running.links[1].address
        await until(lambda: caplog.text.count("disconnected") >= 6)  # it has tried again and again
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [worker_text in record.getMessage() for record in warnings].count(True) == 1
        assert not running.backend.is_ready
        with pytest.raises(Unavailable):
            await running.ask(running.request(prompt_of(5)))


async def test_servers_whose_pages_cannot_be_converted_are_not_paired() -> None:
    async with cluster(decode=Limits(layout=fake_layout(num_layers=3))) as running:
        with pytest.raises(Unavailable, match="whose KV pages a decode server can take"):
            await running.ask(running.request(prompt_of(5)))


@pytest.mark.parametrize(("prefill_block_size", "decode_block_size"), [(4, 16), (16, 4), (3, 5), (5, 3)])
async def test_servers_with_blocks_of_different_sizes_work_together(
    prefill_block_size: int, decode_block_size: int
) -> None:
    async with cluster(
        prefill=Limits(layout=fake_layout(prefill_block_size), max_num_batched_tokens=12),
        decode=Limits(layout=fake_layout(decode_block_size)),
    ) as running:
        for length in (1, 4, 16, 33, 60, 33, 60):  # some of it from the prefix caches the second time
            request = running.request(prompt_of(length))
            answer = await running.ask(request)
            assert answer.outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_a_session_that_the_worker_ends_leaves_no_task_behind() -> None:
    """grpc reads a session's commands in a task of its own."""
    async with cluster() as running:
        for _ in range(3):
            await running.decode.stop()
            await until(lambda: running.links[1].worker is None)
            await running.decode.start()
            await running.connected()
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        assert sum("_consume_request_iterator" in name for name in names) == len(running.links), names
