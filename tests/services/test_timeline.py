"""Each request's timeline: when it was where, and how its pages travelled."""

import asyncio
import logging

import pytest

from baton.core.transfer_stats import TransferReport
from baton_router.requests.timeline import Timeline
from tests.services.cluster import Cluster, cluster, until
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
    caplog.set_level(logging.INFO, "baton_router.requests.flight")
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
        (line,) = (record.getMessage() for record in caplog.records if "ended after" in record.getMessage())
        assert line == f"request {request.request_id}: {timeline.text()}"
        for what in ("pages reserved", "first token", "next token", "KV by grpc"):
            assert what in line
        await running.all_clean()


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
