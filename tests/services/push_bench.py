"""A decode server, one reservation on it, and Push calls made by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace, ReservationTable, TransferDeadlines
from baton.rpc import codec
from baton.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import checksum, views
from tests.services.by_hand import next_event, open_session, reserve
from tests.services.cluster import Limits, Worker, cluster, until
from tests.services.fake_engine import BytesPages

Frame = transfer_pb2.TransferFrame
NUM_BLOCKS = 3  # of the prompt of 9 tokens


class Bench:
    """One decode server with one reservation on a session made by hand."""

    def __init__(self, worker: Worker, channel: grpc.aio.Channel, session: grpc.aio.StreamStreamCall) -> None:
        self.worker = worker
        self.session = session
        self.ticket: transfer_pb2.Ticket
        self.layout: KVLayout = worker.limits.layout
        self.stub = transfer_pb2_grpc.TransferStub(channel)
        self.before = bytes(worker.engine.page_store.memory)
        # What a prefill server would send: pages that no pattern of the receiver's memory resembles.
        self.source = BytesPages(self.layout, NUM_BLOCKS)
        self.source.memory[:] = bytes(index * 7 % 251 for index in range(len(self.source.memory)))

    @property
    def table(self) -> ReservationTable:
        """The decode server's reservations."""
        return self.worker.service._handover.table

    async def reserve(self, number: int = 1) -> transfer_pb2.Ticket:
        await self.session.write(reserve(number, f"by hand {number}"))
        self.ticket = (await next_event(self.session, "reserved")).reserved.ticket
        return self.ticket

    def frame(self, ticket: transfer_pb2.Ticket | None = None) -> Frame:
        ticket = ticket or self.ticket
        return Frame(transfer_id=ticket.transfer_id, epoch=ticket.epoch)

    def open(self, ticket: transfer_pb2.Ticket | None = None, layout: KVLayout | None = None) -> Frame:
        frame = self.frame(ticket)
        frame.open.protocol_version = codec.PROTOCOL_VERSION
        frame.open.layout.CopyFrom(codec.layout_to_proto(layout or self.layout))
        return frame

    def pages(
        self,
        first: int,
        count: int,
        layer: int = 0,
        layers: int = 2,
        ticket: transfer_pb2.Ticket | None = None,
    ) -> Frame:
        """A right frame where the place is one; else its payload still fits what it says."""
        frame = self.frame(ticket)
        place = FramePlace(first, count, layer, layers)
        inside = first + count <= NUM_BLOCKS and layer + layers <= self.layout.num_layers
        store = (
            self.source if inside else BytesPages(KVLayout(4, layer + layers, 1, 2, "float32"), first + count)
        )
        parts = views(store, range(first, first + count), place)
        frame.pages.CopyFrom(wire.pages_message(place, checksum(parts)))
        frame.pages.payload = b"".join(parts)
        return frame

    def commit(self, *first_tokens: int, finished: tuple[int, ...] = ()) -> Frame:
        frame = self.frame()
        frame.commit.first_tokens.extend(first_tokens)
        frame.commit.finished_choices.extend(finished)
        wire.seal(frame.commit)
        return frame

    async def push(self, *frames: Frame) -> transfer_pb2.PushResult:
        """Send the frames, end the call, wait for the answer."""

        async def stream() -> AsyncIterator[Frame]:
            for frame in frames:
                yield frame

        return await asyncio.wait_for(self.stub.Push(stream()), 5)

    async def refused(self, reason: str, *frames: Frame) -> None:
        """The call fails closed, is counted, and no page is touched."""
        counted = self.worker.service._stats.outcomes[reason]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.push(*frames)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION, caught.value
        assert caught.value.details()
        assert self.worker.service._stats.outcomes[reason] == counted + 1
        assert self.worker.service._stats.outcomes["committed"] == 0

    def untouched(self) -> bool:
        return bytes(self.worker.engine.page_store.memory) == self.before

    async def let_go(self) -> None:
        """All pages are free again. What was wrong is prefill's to tell: it was its call."""
        await until(lambda: not self.worker.leftovers)

    async def failed(self) -> None:
        """The router is told, and all pages are free again."""
        failed = (await next_event(self.session, "failed")).failed
        assert failed.reason == worker_pb2.Failed.REASON_TRANSFER
        await until(lambda: not self.worker.leftovers)


@asynccontextmanager
async def bench(deadlines: TransferDeadlines | None = None) -> AsyncIterator[Bench]:
    limits = Limits(num_blocks=16, deadlines=deadlines or TransferDeadlines())
    async with (
        cluster(decode=limits) as running,
        grpc.aio.insecure_channel(running.decode.address) as channel,
    ):
        session = await open_session(channel)
        made = Bench(running.decode, channel, session)
        await made.reserve()
        yield made
        session.cancel()
        await until(lambda: not running.decode.leftovers, str(running.decode.leftovers))
