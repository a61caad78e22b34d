"""Transport "grpc": pages in frames on the transfer's own calls. It is always there."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing

from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import PagesToSend, checksum, frame_places, num_payload_bytes
from baton_kv_transfer.pages.page_reading import PageReader, Piece
from baton_kv_transfer.transports import base

# Measured: smaller frames cost more calls, larger ones fall out of the processor's cache.
FRAME_BYTES = 512 << 10
# Not measured yet: a frame of pages on a GPU costs the receiver a launch and several waits.
DEVICE_FRAME_BYTES = 2 << 20
# From this size on a transfer is worth several connections.
LARGE_TRANSFER_BYTES = 16 << 20


class GrpcRoute(base.Route):
    """Pages in frames on the transfer's own calls, as many at once as there are calls."""

    name = "grpc"

    def __init__(self, request: base.RouteRequest, store: PageStore, reader: PageReader) -> None:
        self._ticket = request.ticket
        self._calls = request.calls
        self._stall_timeout_s = request.stall_timeout_s
        self._layout = store.layout
        self._reader = reader
        self._frame_bytes = FRAME_BYTES if store.device_pages is None else DEVICE_FRAME_BYTES
        if _is_large(request.ticket):
            self._calls.extend(request.push(stream) for stream in range(1, base.NUM_CHANNELS))

    def describe(self, opening: transfer_pb2.Open) -> None:
        """See Route."""
        if len(self._calls) > 1:
            opening.num_streams = len(self._calls)

    async def send(self, pages: PagesToSend) -> int:
        """See Route."""
        num_frames = 0
        async with aclosing(self._reader.pieces(pages)) as pieces:
            async for piece in pieces:
                num_frames += await self._send(piece)
        return num_frames

    async def finish(self) -> None:
        """See Route."""
        for call in self._calls[1:]:
            await call.done_writing()

    async def _send(self, piece: Piece) -> int:
        places = list(frame_places(self._layout, piece.place, self._frame_bytes))
        left = iter(places)
        calls = self._calls[: len(places)]
        if len(calls) == 1:
            await self._drain(calls[0], left, piece)
        else:
            await self._drain_all(calls, left, piece)
        return len(places)

    async def _drain_all(
        self, calls: Sequence[base.PushCall], left: Iterator[FramePlace], piece: Piece
    ) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(self._drain(call, left, piece))
        except ExceptionGroup as errors:  # the first one cancelled the others
            raise errors.exceptions[0] from None

    async def _drain(self, call: base.PushCall, left: Iterator[FramePlace], piece: Piece) -> None:
        """Send frames until none is left; other calls take from the same."""
        for place in left:
            frame = self._frame(place, piece.views(place))
            async with asyncio.timeout(self._stall_timeout_s):
                await call.write(frame)

    def _frame(self, place: FramePlace, parts: Sequence[memoryview]) -> bytes:
        ticket, head = self._ticket, wire.pages_message(place, checksum(parts))
        num_bytes = num_payload_bytes(self._layout, place)
        return wire.encode_pages(ticket.transfer_id, ticket.epoch, head, parts, num_bytes)


def _is_large(ticket: Ticket) -> bool:
    num_blocks = ticket.num_blocks - ticket.first_block
    return num_blocks * ticket.layout.bytes_per_block >= LARGE_TRANSFER_BYTES


def _sending(store: PageStore, reader: PageReader) -> base.SendingSide:
    return base.SendingSide(route=lambda request: GrpcRoute(request, store, reader))


TRANSPORT = base.Transport(sending=_sending, receiving=lambda store, copies: base.ReceivingSide())
