"""Pages that have come, into the places that were reserved for them on a device."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton_kv_transfer.pages.arrived import Arrived, HostWriter, PageWriter, WhenWritten
from baton_kv_transfer.pages.device_copies import DeviceCopies

# Bytes that may wait to be written before no more are taken from a connection.
MAX_WAITING_BYTES = 64 << 20


class DeviceWriter:
    """Pages on a device are written by copies on threads. Belongs to the event loop it is made on."""

    def __init__(self, layout: KVLayout, copies: DeviceCopies) -> None:
        self._layout = layout
        self._copies = copies
        self._loop = asyncio.get_running_loop()
        self._num_waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        # Pages that are converted are read first, and several frames may belong into one page.
        self._converting = threading.Lock()

    def write(self, arrived: Arrived, when_written: WhenWritten) -> None:
        """See PageWriter."""
        self._count(len(arrived.payload))
        try:
            future = self._copies.submit(partial(self._copy, arrived))
        except BaseException as error:  # the threads could not start: else the pages would wait for ever
            self._written(len(arrived.payload), when_written, error)
            raise
        future.add_done_callback(partial(self._done, len(arrived.payload), when_written))

    async def room(self) -> None:
        """See PageWriter."""
        await self._has_room.wait()

    def _count(self, num_bytes: int) -> None:
        self._num_waiting_bytes += num_bytes
        if self._num_waiting_bytes < MAX_WAITING_BYTES:
            self._has_room.set()
        else:
            self._has_room.clear()

    def _written(self, num_bytes: int, when_written: WhenWritten, error: BaseException | None) -> None:
        self._count(-num_bytes)
        when_written(error)

    # From here on: on one of the threads.

    def _done(self, num_bytes: int, when_written: WhenWritten, future: Future[None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._written, num_bytes, when_written, future.exception())

    def _copy(self, arrived: Arrived) -> None:
        place, device = arrived.place, self._copies.pages
        if not _fits_as_it_is(arrived, self._layout):
            self._convert(arrived)
            return
        blocks = arrived.block_table[place.first_block : place.first_block + place.num_blocks]
        write = device.write if isinstance(arrived.payload, memoryview) else device.scatter
        write(arrived.payload, blocks, place.first_layer, place.num_layers)

    def _convert(self, arrived: Arrived) -> None:
        """In host memory: read the pages that it belongs into, write into those, and bring them back."""
        place, device, payload = arrived.place, self._copies.pages, arrived.payload
        targets = arrived.converter.target_blocks(arrived.first_token, arrived.num_tokens, place)
        blocks = arrived.block_table[targets.start : targets.stop]
        if not blocks:
            return
        if not isinstance(payload, memoryview):
            payload = device.to_host(payload)
        num_bytes = len(blocks) * place.num_layers * self._layout.bytes_per_layer
        staged = _StagedPages(self._layout, blocks, place, memoryview(bytearray(num_bytes)))
        with self._converting:
            device.read(blocks, place.first_layer, place.num_layers, staged.memory)
            arrived.convert_into(staged, payload)
            device.write(staged.memory, blocks, place.first_layer, place.num_layers)


class _StagedPages:
    """Some layers of some pages, as a converter sees a pool (baton_kv_transfer.pages.convert.Pages)."""

    def __init__(
        self, layout: KVLayout, blocks: Sequence[int], place: FramePlace, memory: memoryview
    ) -> None:
        self.memory = memory
        self._num_bytes = place.num_layers * layout.bytes_per_layer
        self._starts = {block: index * self._num_bytes for index, block in enumerate(blocks)}

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """Those layers of a page, which are the ones that are staged."""
        start = self._starts[block_id]
        return self.memory[start : start + self._num_bytes]


def page_writer(store: PageStore, copies: DeviceCopies | None) -> PageWriter:
    """The way into a store's pages; `copies` where they lie on a device."""
    return HostWriter(store) if copies is None else DeviceWriter(store.layout, copies)


def _fits_as_it_is(arrived: Arrived, layout: KVLayout) -> bool:
    return arrived.converter.is_same and arrived.first_token % layout.block_size == 0
