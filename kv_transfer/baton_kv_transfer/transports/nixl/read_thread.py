"""The thread that reads with NIXL. All of this runs on it, but for `ReadThread`'s public methods."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.core.errors import TransferRefused
from baton_kv_transfer.transports.nixl import library as nixl_library

# Sources that a reader stays connected with, at about 5 MiB and 10 file descriptors each.
MAX_SOURCES = 64

# Reads under way are looked at again after an eighth of the time since something happened last, so that what
# happened is seen late by an eighth at most; after a millisecond at the latest.
_NAP_SHARE = 1 / 8
_LONGEST_NAP_S = 1e-3


@dataclass(slots=True, eq=False)
class Read:
    """One read on its way through the thread."""

    source: bytes  # metadata of the agent that has the memory
    pieces: Sequence[tuple[int, int]]  # address there, length; they land one after another
    gpu_index: int | None  # of the GPU there, or host memory
    landing: Any  # a part of the landing buffer's memory
    crc: int | None  # crc32c of the bytes; None: not checked
    deadline: float  # of time.monotonic()
    # Called once, on the thread. From then on nothing writes to the landing.
    finish: Callable[[TransferRefused | None], None]


@dataclass(frozen=True, slots=True)
class LandingBuffer:
    """Where bytes land."""

    memory: Any  # a memoryview, or a tensor of bytes on a GPU
    gpu_index: int | None  # None: host memory
    checksum: Callable[[Any], int]  # crc32c (RFC 3720) of a part of it


class _Connection:
    """An agent that reads from one source.

    Each source has its own because NIXL can't cancel: a read whose handle was released, on an agent that was
    told to forget the source, still writes when the source comes back. An agent that is gone writes nothing.
    So a connection ends with the first read on it that fails, and takes the others with it.
    """

    def __init__(self, source: bytes, landing_buffer: LandingBuffer) -> None:
        self._bindings = nixl_library.load()
        self._agent = nixl_library.new_agent(has_progress_thread=False)
        self._landing_gpu = landing_buffer.gpu_index
        nixl_library.register(self._agent, landing_buffer.memory, landing_buffer.gpu_index)
        self._source_name = self._agent.loadRemoteMD(source)
        self.reads: dict[Read, int | None] = {}  # under way, each with NIXL's handle once it has one

    def post(self, read: Read) -> None:
        """Raises an error of NIXL's where the source can't be reached."""
        self.reads[read] = None
        handle = self._agent.createXferReq(
            self._bindings.NIXL_READ,
            _descriptors(_landing_pieces(read), self._landing_gpu),
            _descriptors(read.pieces, read.gpu_index),
            self._source_name,
            b"",
            [],
        )
        self.reads[read] = handle
        self._agent.postXferReq(handle, b"")

    def take_if_done(self, read: Read) -> bool:
        """Whether it was read, and is not under way any more. Raises an error of NIXL's where it failed."""
        handle = self.reads[read]
        if self._agent.getXferStatus(handle) == self._bindings.NIXL_IN_PROG:
            return False
        self._agent.releaseXferReq(handle)
        del self.reads[read]
        return True

    def close(self) -> None:
        """End the agent. Its reads are not under way any more."""
        for handle in self.reads.values():
            if handle is not None:
                with suppress(Exception):  # they end with the agent anyway
                    self._agent.releaseXferReq(handle)
        del self._agent  # the last reference


class ReadThread:
    """Takes reads in, looks after them, and ends each by its deadline."""

    def __init__(self, landing_buffer: LandingBuffer, stopped: Callable[[], None]) -> None:
        """`stopped` is called on the thread as the last thing it does."""
        self._landing_buffer = landing_buffer
        self._stopped = stopped
        # Bounded by the slots of the landing buffer.
        self._inbox: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._connections: dict[bytes, _Connection] = {}  # the one used last stands last
        self._last_event = 0.0
        self._thread = threading.Thread(target=self._run, name="nixl-reader", daemon=True)
        self._thread.start()

    def start(self, read: Read) -> None:
        """Read, then call `read.finish`."""
        self._inbox.put(read)

    def stop(self) -> None:
        """End the thread; reads under way fail."""
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for the end, which `stopped` has told of."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_message():
                self._look_after_reads()
        finally:
            for source in list(self._connections):
                self._drop(source, TransferRefused("nixl", "the reader was closed"))
            self._stopped()

    def _take_message(self) -> bool:
        try:
            message = self._inbox.get(timeout=self._nap())
        except queue.Empty:
            return True
        self._last_event = time.monotonic()
        if message is None:
            return False
        self._begin(message)
        return True

    def _nap(self) -> float | None:
        if not any(connection.reads for connection in self._connections.values()):
            return None
        return min((time.monotonic() - self._last_event) * _NAP_SHARE, _LONGEST_NAP_S)

    def _begin(self, read: Read) -> None:
        if time.monotonic() >= read.deadline:
            read.finish(TransferRefused("deadline", "a read's time was over before it began"))
            return
        try:
            connection = self._connection(read.source)
        except Exception as error:  # what NIXL raises has no other base
            read.finish(_refused(error))
            return
        try:
            connection.post(read)
        except Exception as error:
            self._drop(read.source, _refused(error))

    def _connection(self, source: bytes) -> _Connection:
        connection = self._connections.pop(source, None)
        if connection is None:
            self._make_room()
            connection = _Connection(source, self._landing_buffer)
        self._connections[source] = connection
        return connection

    def _make_room(self) -> None:
        idle = [source for source, connection in self._connections.items() if not connection.reads]
        for source in idle[: max(0, len(self._connections) - MAX_SOURCES + 1)]:
            self._connections.pop(source).close()

    def _look_after_reads(self) -> None:
        for source, connection in list(self._connections.items()):
            for read in list(connection.reads):
                try:
                    is_done = connection.take_if_done(read)
                except Exception as error:
                    self._drop(source, _refused(error))
                    break
                if is_done:
                    self._finish(read)
                elif time.monotonic() >= read.deadline:
                    late = "the server with the pages did not let them be read in time"
                    self._drop(source, TransferRefused("deadline", late))
                    break

    def _finish(self, read: Read) -> None:
        if read.crc is None or self._landing_buffer.checksum(read.landing) == read.crc:
            read.finish(None)
        else:
            read.finish(TransferRefused("checksum", "pages were not what their server said of them"))
        self._last_event = time.monotonic()

    def _drop(self, source: bytes, reason: TransferRefused) -> None:
        connection = self._connections.pop(source, None)
        if connection is None:
            return
        reads = list(connection.reads)
        connection.close()
        for read in reads:
            read.finish(TransferRefused(reason.reason, str(reason)))  # each is raised somewhere else


def _descriptors(pieces: Sequence[tuple[int, int]], gpu_index: int | None) -> Any:
    rows = np.zeros((len(pieces), 3), np.uint64)  # [n, 3]: address, length, device
    rows[:, :2] = pieces
    rows[:, 2] = gpu_index or 0
    return nixl_library.load().nixlXferDList(nixl_library.segment(gpu_index), rows)


def _landing_pieces(read: Read) -> list[tuple[int, int]]:
    address = nixl_library.address_of(read.landing)
    pieces = []
    for _, length in read.pieces:
        pieces.append((address, length))
        address += length
    return pieces


def _refused(error: Exception) -> TransferRefused:
    return TransferRefused("nixl", f"NIXL can't read from the server with the pages: {error}")
