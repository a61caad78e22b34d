"""Reading another server's KV pool with NIXL: over RDMA, or between the processes of one machine.

The side that has the pages registers its pool and does nothing else. The side that wants them reads them into
a landing buffer of its own, checks them there, and copies them into its pages. So no other server ever writes
this one's pages, and a read that hangs holds a slot of the landing buffer, never a page.
"""

import asyncio
import logging
import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from crc32c import crc32c

from baton.core.errors import TransferRefused
from baton.core.page_ports import DevicePages
from baton_kv_transfer.transports.base import Landing
from baton_kv_transfer.transports.nixl import library as nixl_library
from baton_kv_transfer.transports.nixl.read_thread import LandingBuffer, Read, ReadThread

logger = logging.getLogger(__name__)

# Of the landing buffer, whose slots hold one read each.
SLOT_BYTES = 8 << 20
# How long the reader's thread may be within a call of NIXL that ignores the deadline.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class RemoteMemory:
    """A KV pool that can be read."""

    agent_metadata: bytes  # of its NixlSource, and no other's
    base_address: int  # of block 0
    num_blocks: int
    bytes_per_block: int
    gpu_index: int | None = None  # of its GPU, as its own process counts them; None: host memory


class NixlSource:
    """A KV pool that others may read until `close`."""

    def __init__(
        self, memory: Any, bytes_per_block: int, num_blocks: int, gpu_index: int | None = None
    ) -> None:
        """Register `memory`, block after block: bytes, or with `gpu_index` a tensor of bytes there.

        Raises StartupError where NIXL does not work.
        """
        if memory.nbytes != bytes_per_block * num_blocks:
            raise ValueError(f"{memory.nbytes} bytes are not {num_blocks} blocks of {bytes_per_block}")
        self._memory = memory  # stays where it is while it is registered
        # It answers those who connect. Reads don't need it, nor this process.
        self._agent = nixl_library.new_agent(has_progress_thread=True)
        nixl_library.register(self._agent, memory, gpu_index)
        self.remote = RemoteMemory(
            self._agent.getLocalMD(), nixl_library.address_of(memory), num_blocks, bytes_per_block, gpu_index
        )

    def close(self) -> None:
        """Answer nobody any more, and end the agent's thread. Readers that are connected may read on."""
        self._agent = None


class NixlReader:
    """Reads other servers' pools. Belongs to the event loop that it was made on.

    A read takes a slot of the landing buffer, and gives it back when the read has failed or its landing is
    released. Reads wait for slots; those of one source never hold the last of several, so that a source that
    hangs does not keep others from being read.
    """

    def __init__(
        self, *, num_slots: int = 4, slot_bytes: int = SLOT_BYTES, device: DevicePages | None = None
    ) -> None:
        """`device`: where the pages lie, and what is read lands; None: host memory.

        Blocks for about a second. Raises StartupError where NIXL does not work.
        """
        # What the first agent of a process takes half a second for, or fails at, is better done now.
        nixl_library.new_agent(has_progress_thread=False)
        self.slot_bytes = slot_bytes
        self._loop = asyncio.get_running_loop()
        landing_buffer = _landing_buffer(num_slots * slot_bytes, device)
        self._landing_buffer = landing_buffer.memory
        self._free_slots: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(num_slots):
            self._free_slots.put_nowait(slot)
        self._max_reads_of_source = max(1, num_slots - 1)
        self._turns: WeakValueDictionary[bytes, asyncio.Semaphore] = WeakValueDictionary()
        self._is_closed = False
        self._has_stopped = asyncio.Event()
        self._thread = ReadThread(landing_buffer, partial(self._tell_loop, self._has_stopped.set))

    async def connect(self, remote: RemoteMemory, timeout_s: float) -> None:
        """Make sure that `remote` can be read, so that the first read does not find out.

        Raises TransferRefused as `read` does: above all where the two servers have no RDMA between them and
        are not on one machine.
        """
        landing = await self.read(remote, [(0, 1)], crc=None, timeout_s=timeout_s)
        landing.release()

    async def read(
        self, remote: RemoteMemory, ranges: Sequence[tuple[int, int]], *, crc: int | None, timeout_s: float
    ) -> Landing:
        """Read byte ranges (offset, length) of the pool; they land in this order, one after another.

        `crc` is the crc32c of all the bytes; None leaves it to the caller. Raises TransferRefused: "range",
        "deadline" (waiting for a slot counts), "checksum", or "nixl" where the source can't be read.
        """
        pieces, num_bytes = self._pieces(remote, ranges)
        deadline = time.monotonic() + timeout_s
        turn, slot = await self._take_slot(remote.agent_metadata, timeout_s)
        start = slot * self.slot_bytes
        memory = self._landing_buffer[start : start + num_bytes]
        landing = Landing(memory, partial(self._free_slots.put_nowait, slot))
        future: asyncio.Future[Landing] = self._loop.create_future()
        finish = partial(self._tell_loop, partial(self._settle, future, landing, turn))
        read = Read(remote.agent_metadata, pieces, remote.gpu_index, memory, crc, deadline, finish)
        self._thread.start(read)
        try:
            async with asyncio.timeout(deadline + GRACE_S - time.monotonic()):
                return await _landed(future)
        except TimeoutError:
            raise TransferRefused("deadline", "a call of NIXL does not return") from None

    async def close(self) -> None:
        """End the thread and every connection. Reads under way fail."""
        self._is_closed = True
        self._thread.stop()
        try:
            async with asyncio.timeout(GRACE_S):
                await self._has_stopped.wait()
        except TimeoutError:
            logger.error("the thread that reads with NIXL does not end: a call of NIXL does not return")
        else:
            self._thread.join()

    def _pieces(
        self, remote: RemoteMemory, ranges: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], int]:
        """Address and length of what lies apart, and the number of bytes."""
        size = remote.num_blocks * remote.bytes_per_block
        pieces: list[tuple[int, int]] = []
        num_bytes = end = 0
        for offset, length in ranges:
            if offset < 0 or length <= 0 or offset + length > size:
                raise TransferRefused("range", f"bytes {offset}..{offset + length} of a pool of {size}")
            address = remote.base_address + offset
            if pieces and address == end:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + length)
            else:
                pieces.append((address, length))
            end = address + length
            num_bytes += length
        if not 0 < num_bytes <= self.slot_bytes:
            raise TransferRefused("range", f"a read of {num_bytes} bytes; 1 to {self.slot_bytes} can be read")
        return pieces, num_bytes

    async def _take_slot(self, source: bytes, timeout_s: float) -> tuple[asyncio.Semaphore, int]:
        turn = self._turns.setdefault(source, asyncio.Semaphore(self._max_reads_of_source))
        try:
            async with asyncio.timeout(timeout_s):
                await turn.acquire()
                try:
                    slot = await self._free_slots.get()
                except BaseException:
                    turn.release()
                    raise
        except TimeoutError:
            raise TransferRefused("deadline", f"no landing slot was free for {timeout_s:g} s") from None
        if self._is_closed or self._has_stopped.is_set():
            turn.release()
            self._free_slots.put_nowait(slot)
            raise TransferRefused("nixl", "the reader was closed")
        return turn, slot

    def _tell_loop(self, callback: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *args)

    def _settle(
        self,
        future: asyncio.Future[Landing],
        landing: Landing,
        turn: asyncio.Semaphore,
        error: TransferRefused | None,
    ) -> None:
        """A read has ended: whoever began it may have been cancelled."""
        turn.release()
        if error is None and not future.done():
            future.set_result(landing)
            return
        landing.release()
        if error is not None and not future.done():
            future.set_exception(error)


def _landing_buffer(num_bytes: int, device: DevicePages | None) -> LandingBuffer:
    if device is None:
        # In huge pages, of which a read between processes has fewer to look up.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return LandingBuffer(memoryview(memory), None, crc32c)
    return LandingBuffer(device.buffer(num_bytes), device.gpu_index, device.checksum)


async def _landed(future: asyncio.Future[Landing]) -> Landing:
    try:
        return await future
    except asyncio.CancelledError:
        # It may have come when the bytes were there, and nobody would know of them.
        if future.done() and not future.cancelled() and future.exception() is None:
            future.result().release()
        raise
