"""Each request's timeline: when it was where, and how its pages travelled."""

import asyncio
import logging

import pytest

from baton.core.errors import Unavailable
from baton.core.transfer_stats import TransferReport
from baton_router.requests.timeline import Timeline
from tests.services.cluster import DEADLINE_S, Cluster, Limits, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of


def test_text_of_a_timeline() -> None:
    timeline = Timeline(100.0)
    timeline.stamp("first token", 100.05)
    timeline.stamp("first token", 100.07)
    timeline.stamp("ended", 100.25)
    timeline.num_attempts = 2
    assert timeline.text() == "first token after 50.0 ms, ended after 250.0 ms, 2 attempts"
    timeline.transfer = TransferReport("nixl", 1_500_000, seconds=0.04, exposed_seconds=0.01)
    assert timeline.text().endswith(
        ", 1.50 MB of KV by nixl in 30.0 ms while the prompt was computed and 10.0 ms after it"
    )


def timeline_of(running: Cluster, request_id: str) -> Timeline:
    return running.backend._flights[request_id]._timeline


async def test_a_request_has_its_transfer_in_its_timeline(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "baton_router.requests.flight")
    async with cluster() as running:
        request = running.request(prompt_of(60), max_tokens=5)
        gate = running.decode.engine.runner.gate
        gate.clear()
        task = asyncio.create_task(running.ask(request))
        await until(lambda: request.request_id in running.backend._flights)
        timeline = timeline_of(running, request.request_id)
        await until(lambda: timeline.transfer is not None)
        gate.set()
        assert (await task).outcomes == expected(request.token_ids, request.sampling)
        layout = running.prefill.service._engine.store.layout
        assert timeline.transfer is not None
        assert timeline.transfer.num_bytes == layout.blocks_for(60) * layout.bytes_per_block
        assert timeline.transfer.transport == "grpc"
        assert 0 <= timeline.transfer.exposed_seconds <= timeline.transfer.seconds
        assert timeline.transfer.hidden_seconds + timeline.transfer.exposed_seconds == pytest.approx(
            timeline.transfer.seconds
        )
        begin, line = (record.getMessage() for record in caplog.records)
        assert begin.startswith(f"request {request.request_id} begins: 60 prompt tokens, at most 5 answered")
        assert line == f"request {request.request_id}: 60 prompt tokens, 5 answered, {timeline.text()}"
        assert {record.levelname for record in caplog.records} == {"DEBUG"}
        for what in ("pages reserved", "first token", "next token", "KV by grpc"):
            assert what in line
        await running.all_clean()


async def test_a_request_that_fails_is_a_line_with_its_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with cluster() as running:
        answered, failing = (running.request(prompt_of(60, salt)) for salt in (1, 2))
        await running.ask(answered)
        running.decode.engine.runner.gate.clear()
        task = asyncio.create_task(running.ask(failing))
        await until(lambda: failing.request_id in running.backend._flights)
        running.backend.end_all(Unavailable("the server is stopping"))
        running.decode.engine.runner.gate.set()
        with pytest.raises(Unavailable):
            await task
    lines = [record.getMessage() for record in caplog.records if "request" in record.getMessage()]
    assert f"request {failing.request_id} failed: the server is stopping" in lines
    assert not any(answered.request_id in line for line in lines)


@pytest.mark.parametrize(("transport", "carrier"), [("grpc", "grpc"), ("nccl", "Gloo")])
async def test_the_log_says_what_carries_pages(
    transport: str, carrier: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Process groups are of Gloo where pages are not on GPUs, whatever their transport is called."""
    caplog.set_level(logging.DEBUG)
    limits = Limits(kv_transport=transport)
    async with cluster(limits, limits) as running, asyncio.timeout(DEADLINE_S):
        salt, lines = 0, ""
        while f"KV by {carrier} " not in lines:  # a pair is made meanwhile, and gRPC carries
            await running.ask(running.request(prompt_of(60, salt), max_tokens=3))
            salt, lines = salt + 1, caplog.text
    assert "KV by nccl" not in lines
    assert "KV transport to" in lines
    named = f"{transport}, which is {carrier} here" if transport != carrier else transport
    assert f": {named} (it was asked for)" in lines


async def test_a_prefill_server_that_is_lost_after_its_part_is_done_is_no_error() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(60), max_tokens=400)
        deltas = running.backend.generate(request)
        tokens = [await anext(deltas)]
        timeline = timeline_of(running, request.request_id)
        while timeline.transfer is None:
            tokens.append(await anext(deltas))
        assert running.links[0].worker is not None
        assert running.links[0].worker.num_in_flight == 0
        await running.prefill.stop()
        await until(lambda: running.links[0].worker is None)
        tokens += [delta async for delta in deltas]
        assert sum(len(delta.tokens) for delta in tokens) == 400
        await running.prefill.start()
        await running.connected()
        await running.all_clean()
