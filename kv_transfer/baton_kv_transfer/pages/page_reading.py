"""The bytes of pages that leave, in pieces: where they lie in host memory, or staged there from a device."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Protocol

from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton_kv_transfer.pages import frames
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.frames import PagesToSend
from baton_kv_transfer.pages.waiting import settled

# Host memory for pieces on their way, of all transfers: each has one being sent and one being read.
NUM_STAGES = 8


class Piece:
    """Pages of one place whose bytes can be looked at until the next piece is asked for."""

    def __init__(self, place: FramePlace, views: Callable[[FramePlace], list[memoryview]]) -> None:
        self.place = place
        self.views = views  # the bytes of a part of the place, in order


Pieces = AsyncGenerator[Piece, None]


class PageReader(Protocol):
    """Gets at the bytes of pages."""

    def pieces(self, pages: PagesToSend) -> Pieces:
        """All of the pages. To be closed, after which nothing is read any more."""
        ...

    async def checksum(self, place: FramePlace, blocks: Sequence[int]) -> int:
        """crc32c (RFC 3720) of a place, whose pages are `blocks`."""
        ...


class HostReader:
    """Pages in host memory: nothing has to be done."""

    def __init__(self, store: PageStore) -> None:
        self._store = store

    async def pieces(self, pages: PagesToSend) -> Pieces:
        """See PageReader."""

        def views(place: FramePlace) -> list[memoryview]:
            first = place.first_block - pages.place.first_block
            return frames.views(self._store, pages.blocks[first : first + place.num_blocks], place)

        yield Piece(pages.place, views)

    async def checksum(self, place: FramePlace, blocks: Sequence[int]) -> int:
        """See PageReader."""
        return frames.checksum(frames.views(self._store, blocks, place))


class DeviceReader:
    """Pages on a device: while one piece is sent, the next is copied to host memory."""

    def __init__(self, layout: KVLayout, copies: DeviceCopies) -> None:
        self._layout = layout
        self._copies = copies
        # None: one that is still to be made, where all that were made are in use.
        self._free: asyncio.LifoQueue[memoryview | None] = asyncio.LifoQueue()
        for _ in range(NUM_STAGES):
            self._free.put_nowait(None)

    async def pieces(self, pages: PagesToSend) -> Pieces:
        """See PageReader."""
        places = list(frames.frame_places(self._layout, pages.place, self._copies.stage_bytes))
        reading = asyncio.create_task(self._read(places[0], pages))
        is_taken = False
        try:
            for following in (*places[1:], None):
                stage, piece = await reading
                try:
                    is_taken = following is None
                    if following is not None:
                        reading = asyncio.create_task(self._read(following, pages))
                    yield piece
                finally:
                    self._free.put_nowait(stage)
        finally:
            if not is_taken:
                await self._drop(reading)

    async def checksum(self, place: FramePlace, blocks: Sequence[int]) -> int:
        """See PageReader."""
        device = self._copies.pages
        return await self._copies.run(
            partial(device.pages_checksum, blocks, place.first_layer, place.num_layers)
        )

    async def _read(self, place: FramePlace, pages: PagesToSend) -> tuple[memoryview, Piece]:
        """A stage, and the piece that it holds."""
        stage = await self._stage()
        first = place.first_block - pages.place.first_block
        blocks = pages.blocks[first : first + place.num_blocks]
        staged = stage[: frames.num_payload_bytes(self._layout, place)]
        read = partial(self._copies.pages.read, blocks, place.first_layer, place.num_layers, staged)
        try:
            await self._copies.run(read)
        except BaseException:
            self._free.put_nowait(stage)
            raise
        return stage, Piece(place, partial(self._views, staged, place))

    async def _stage(self) -> memoryview:
        stage = await self._free.get()
        if stage is not None:
            return stage
        try:
            return await self._copies.run(partial(self._copies.pages.host_buffer, self._copies.stage_bytes))
        except BaseException:  # nobody has it: the next one makes it anew
            self._free.put_nowait(None)
            raise

    async def _drop(self, reading: asyncio.Task[tuple[memoryview, Piece]]) -> None:
        """Give back the stage of a piece that nobody asks for any more, once it is not read into."""
        reading.cancel()
        await settled(reading)
        if not reading.cancelled() and reading.exception() is None:
            self._free.put_nowait(reading.result()[0])

    def _views(self, staged: memoryview, whole: FramePlace, place: FramePlace) -> list[memoryview]:
        """A part of a staged place; either has all layers of the other, or both are of one block."""
        layer = self._layout.bytes_per_layer
        start = (place.first_block - whole.first_block) * whole.num_layers
        start += place.first_layer - whole.first_layer
        return [staged[start * layer :][: place.num_blocks * place.num_layers * layer]]


def page_reader(store: PageStore, copies: DeviceCopies | None) -> PageReader:
    """The way to a store's pages; `copies` where they lie on a device."""
    return HostReader(store) if copies is None else DeviceReader(store.layout, copies)
