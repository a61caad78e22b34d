"""Copies of pages on a device, which block: on threads, so that the event loop goes on."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from contextlib import suppress
from typing import TypeVar

from baton.core.kv_layout import KVLayout
from baton.core.page_ports import DevicePages
from baton_kv_transfer.pages.waiting import settled

# So many copies overlap: one prepares while the device works on another's.
NUM_THREADS = 3
# Bytes of one copy: enough to make its own cost small, little enough that the network does not wait for it.
_STAGE_BYTES = 8 << 20

T = TypeVar("T")


class DeviceCopies:
    """Threads on which one worker's transfers, of either direction, copy pages."""

    def __init__(self, pages: DevicePages, layout: KVLayout) -> None:
        self.pages = pages
        self.stage_bytes = max(_STAGE_BYTES, layout.bytes_per_layer)  # of one copy, at most
        self._threads = ThreadPoolExecutor(
            NUM_THREADS, "page-copies", initializer=lambda: pages.prepare(self.stage_bytes)
        )
        for _ in range(NUM_THREADS):  # a first copy would wait for memory and kernels
            with suppress(BrokenThreadPool):  # one has failed already: copies are told, each of them
                self._threads.submit(_nothing)

    def submit(self, copy: Callable[[], T]) -> Future[T]:
        """Run a copy on one of the threads."""
        return self._threads.submit(copy)

    async def run(self, copy: Callable[[], T]) -> T:
        """Run a copy and wait for it; also where the caller is cancelled, since it reads and writes pages."""
        future = self._threads.submit(copy)
        waiting = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():
                await settled(waiting)
            raise

    def close(self) -> None:
        """End the threads, when what is queued is done."""
        self._threads.shutdown(wait=False)


def _nothing() -> None:
    """Starts a thread."""
