"""What a broken peer says of its pages costs nobody else anything."""

import asyncio
from typing import Any, cast

import pytest

from baton.v1 import transfer_pb2
from baton_kv_transfer.transfers.pace import InboundPace
from baton_kv_transfer.transports.pair.receiver import PairReceiver
from tests.services.push_bench import NUM_BLOCKS, Bench, bench

HUGE = 2**32 - 1


def serving(made: Bench) -> InboundPace:
    """The decode server's pace, as where requests are running."""
    pace = made.worker.service.receiver._worker.pace
    pace._is_serving = lambda: True
    return pace


async def goes_through(made: Bench) -> None:
    await made.reserve(2)
    result = await asyncio.wait_for(made.push(made.open(), made.pages(0, 3), made.commit(5)), 3)
    assert result.bytes_received == NUM_BLOCKS * made.layout.bytes_per_block


@pytest.mark.parametrize("field", ["num_blocks", "num_layers"])
async def test_a_read_of_more_than_there_is(field: str) -> None:
    async with bench() as made:
        serving(made)
        call = made.stub.Push()
        await call.write(made.open())
        frame = made.frame()
        frame.shipped.pages.CopyFrom(transfer_pb2.Pages(first_block=0, num_blocks=3, num_layers=2))
        setattr(frame.shipped.pages, field, HUGE)
        frame.shipped.source_blocks.extend(range(3))
        await call.write(frame)
        await asyncio.sleep(0.2)
        call.cancel()
        await goes_through(made)


async def test_a_message_longer_than_any() -> None:
    async with bench() as made:
        serving(made)
        receiver = PairReceiver(made.worker.service.receiver._worker, 1 << 20, None)

        class End:
            def expect(self, num_bytes, crc, token):
                raise AssertionError

        async def frames():
            yield transfer_pb2.PairFrame(pages=transfer_pb2.PairPages(num_bytes=HUGE))

        task = asyncio.create_task(receiver._read(cast(Any, End()), frames()))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await goes_through(made)


async def test_an_unknown_transport_is_refused_and_makes_no_metric() -> None:
    async with bench() as made:
        frame = made.open()
        frame.open.transport = "grpb"
        await made.refused("transport", frame, made.pages(0, 3))
        assert made.untouched()
        assert "grpb" not in made.worker.service._stats.transports
