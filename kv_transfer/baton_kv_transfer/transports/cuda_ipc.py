"""Transport "cuda_ipc": the decode server reads pools of other processes of its machine that lie on a GPU.

The side that has the pages offers its pool and writes nothing: this side fetches what it is told of into
buffers of its own, checks it there, and only then copies it into the pages that were reserved.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.page_ports import ExportedPool, PageStore
from baton.core.ticket import WorkerTransports
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.frames import num_payload_bytes
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transports import base
from baton_kv_transfer.transports.read_route import ReadRoute

READ_BYTES = 16 << 20
NUM_SLOTS = 4  # buffers of this size: reads that are under way, checked, or being written
# A mapping keeps the other process's memory, also when that has died: none outlives its transfers by more.
LINGER_S = 5.0


@dataclass(eq=False, slots=True)
class _Mapping:
    """A pool of another process, and who reads it."""

    pool: ExportedPool
    layout: KVLayout
    opened: asyncio.Task[Any]
    num_users: int = 0
    closing: asyncio.TimerHandle | None = None


class IpcReader:
    """Fetches pages of other processes. Belongs to the event loop that it was made on."""

    def __init__(self, copies: DeviceCopies, layout: KVLayout) -> None:
        self._copies = copies
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        slot_bytes = max(READ_BYTES, layout.bytes_per_layer)
        for _ in range(NUM_SLOTS):
            self._free.put_nowait(copies.pages.buffer(slot_bytes))
        self._mappings: dict[bytes, _Mapping] = {}

    async def connect(self, memory: transfer_pb2.CudaIpcMemory, layout: KVLayout) -> None:
        """Map a sender's pool, whose pages have `layout`, until `disconnect`. Raises TransferRefused."""
        mapping = self._mapping(ExportedPool(memory.handle, memory.offset, memory.num_blocks), layout)
        mapping.num_users += 1
        if mapping.closing is not None:
            mapping.closing.cancel()
            mapping.closing = None
        try:
            await asyncio.shield(mapping.opened)
        except BaseException:
            self.disconnect(memory)
            raise

    def disconnect(self, memory: transfer_pb2.CudaIpcMemory) -> None:
        """One `connect` less; nothing is read for it any more."""
        mapping = self._mappings[memory.handle]
        mapping.num_users -= 1
        if mapping.num_users:
            return
        if mapping.opened.done() and mapping.opened.exception() is not None:
            del self._mappings[memory.handle]
            return
        loop = asyncio.get_running_loop()
        mapping.closing = loop.call_later(LINGER_S, self._unmap, memory.handle)

    async def read(
        self,
        memory: transfer_pb2.CudaIpcMemory,
        layout: KVLayout,
        shipped: transfer_pb2.Shipped,
        timeout_s: float,
    ) -> base.Landing:
        """Fetch the pages that a frame names; `memory` is connected. Raises TransferRefused."""
        place, mapping = base.shipped_place(shipped, layout), self._mappings[memory.handle]
        num_bytes = num_payload_bytes(layout, place)
        if not shipped.source_blocks or max(shipped.source_blocks) >= memory.num_blocks:
            raise TransferRefused("range", f"blocks of a pool that has {memory.num_blocks}")
        slot = await self._slot(timeout_s)
        landing = base.Landing(slot[:num_bytes], partial(self._free.put_nowait, slot))
        try:
            if num_bytes > len(slot):
                raise TransferRefused("range", f"a read of {num_bytes} bytes; up to {len(slot)} can be read")
            fetch = partial(
                self._copies.pages.fetch, mapping.opened.result(), list(shipped.source_blocks),
                place.first_layer, place.num_layers, landing.memory,
            )  # fmt: skip
            if await self._copies.run(fetch) != shipped.pages.crc32c:
                raise TransferRefused("checksum", "pages were not what their server said of them")
        except BaseException:
            landing.release()
            raise
        return landing

    async def close(self) -> None:
        """Unmap everything. Nothing may be read any more."""
        for mapping in list(self._mappings.values()):
            await asyncio.gather(mapping.opened, return_exceptions=True)
        for handle in list(self._mappings):
            self._unmap(handle)

    def _mapping(self, pool: ExportedPool, layout: KVLayout) -> _Mapping:
        mapping = self._mappings.get(pool.handle)
        if mapping is None:
            opening = asyncio.create_task(self._copies.run(partial(self._copies.pages.open, pool, layout)))
            mapping = self._mappings[pool.handle] = _Mapping(pool, layout, opening)
        if (mapping.pool, mapping.layout) != (pool, layout):
            raise TransferRefused("range", "a pool that is mapped already, with another layout")
        return mapping

    def _unmap(self, handle: bytes) -> None:
        mapping = self._mappings.pop(handle)
        if mapping.closing is not None:
            mapping.closing.cancel()
        if mapping.opened.exception() is None:
            self._copies.submit(partial(self._copies.pages.close, mapping.opened.result()))

    async def _slot(self, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._free.get()
        except TimeoutError:
            raise TransferRefused("deadline", f"no landing buffer was free for {timeout_s:g} s") from None


class _IpcRoute(ReadRoute):
    name = "cuda_ipc"
    failures = ReadRoute.failures | {"cuda_ipc"}
    read_bytes = READ_BYTES


class _IpcIntake(base.Intake):
    def __init__(self, reader: IpcReader, request: base.IntakeRequest) -> None:
        super().__init__(request)
        self._reader = reader
        self._memory = request.opening.cuda_ipc
        self._is_connected = False

    async def prepare(self) -> None:
        """See Intake: map the sender's pool."""
        await self._reader.connect(self._memory, self.request.layout)
        self._is_connected = True

    async def fetch(self, shipped: transfer_pb2.Shipped) -> base.Landing:
        """See Intake."""
        request = self.request
        return await self._reader.read(self._memory, request.layout, shipped, request.stall_timeout_s)

    def close(self) -> None:
        """See Intake."""
        if self._is_connected:
            self._reader.disconnect(self._memory)


def _sending(store: PageStore, reader: PageReader) -> base.SendingSide:
    assert store.device_pages is not None
    pool = store.device_pages.export()
    ipc = transfer_pb2.CudaIpcMemory(handle=pool.handle, offset=pool.offset, num_blocks=pool.num_blocks)
    memory = transfer_pb2.Open(cuda_ipc=ipc)
    return base.SendingSide(route=lambda request: _IpcRoute(request, store.layout, reader, memory))


def _receiving(store: PageStore, copies: DeviceCopies | None) -> base.ReceivingSide:
    assert copies is not None
    copies.pages.export()  # what can't be offered can't be mapped either
    reader = IpcReader(copies, store.layout)
    return base.ReceivingSide(intake=partial(_IpcIntake, reader), close=reader.close)


def _lack(store: PageStore) -> str | None:
    is_on_gpu = store.device_pages is not None
    return None if is_on_gpu else "is for pages on a GPU: use --device cuda, or another one"


def _obstacle(mine: WorkerTransports, theirs: WorkerTransports) -> str | None:
    return None if mine.is_on_host_of(theirs) else "the two servers are not on one host"


TRANSPORT = base.Transport(sending=_sending, receiving=_receiving, lack=_lack, obstacle=_obstacle)
