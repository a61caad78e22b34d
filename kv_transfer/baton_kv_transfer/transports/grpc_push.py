"""How the pages of one transfer leave: the interface of every transport's sending side, and gRPC's."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Protocol

import grpc

from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import checksum, frame_places, num_payload_bytes
from baton_kv_transfer.pages.page_reading import PageReader, Piece
from baton_kv_transfer.transfers.outbound import PagesToSend

# Measured: smaller frames cost more calls, larger ones fall out of the processor's cache.
FRAME_BYTES = 512 << 10
# Not measured yet: a frame of pages on a GPU costs the receiver a launch and several waits.
DEVICE_FRAME_BYTES = 2 << 20

PushCall = grpc.aio.StreamUnaryCall[bytes, transfer_pb2.PushResult]


class Route(Protocol):
    """One transfer's way over one transport. Its calls are cancelled by whoever made them."""

    name: str
    keeps_pages: bool  # pages are read until the transfer has ended, not only until `send` returns
    waits_for_open: bool  # pages may overtake the frame that opens the transfer: it is to be taken first

    def describe(self, opening: transfer_pb2.Open) -> None:
        """Add to the transfer's first frame what the receiver has to know."""
        ...

    async def send(self, pages: PagesToSend) -> int:
        """Send pages; returns how many frames, messages or descriptors that took.

        Raises TransferRefused or an error of gRPC where they can't be sent.
        """
        ...

    async def finish(self) -> None:
        """All pages were sent; the last frame comes after this."""
        ...


class GrpcRoute:
    """Pages in frames on the transfer's own calls, as many at once as there are calls."""

    name = "grpc"
    keeps_pages = False
    waits_for_open = False

    def __init__(
        self,
        ticket: Ticket,
        layout: KVLayout,
        reader: PageReader,
        calls: Sequence[PushCall],
        stall_timeout_s: float,
        frame_bytes: int,
    ) -> None:
        self._ticket = ticket
        self._layout = layout
        self._reader = reader
        self._calls = calls
        self._stall_timeout_s = stall_timeout_s
        self._frame_bytes = frame_bytes

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

    async def _drain_all(self, calls: Sequence[PushCall], left: Iterator[FramePlace], piece: Piece) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(self._drain(call, left, piece))
        except ExceptionGroup as errors:  # the first one cancelled the others
            raise errors.exceptions[0] from None

    async def _drain(self, call: PushCall, left: Iterator[FramePlace], piece: Piece) -> None:
        """Send frames until none is left; other calls take from the same."""
        for place in left:
            frame = self._frame(place, piece.views(place))
            async with asyncio.timeout(self._stall_timeout_s):
                await call.write(frame)

    def _frame(self, place: FramePlace, parts: Sequence[memoryview]) -> bytes:
        head = wire.pages_message(place, checksum(parts))
        num_bytes = num_payload_bytes(self._layout, place)
        return wire.encode_pages(self._ticket.transfer_id, self._ticket.epoch, head, parts, num_bytes)
