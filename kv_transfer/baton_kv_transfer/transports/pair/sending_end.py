"""The end of a pair that sends: on its thread a message is put together while the last is on the wire."""

import asyncio
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from baton.core.errors import TransferRefused
from baton_kv_transfer.pages.waiting import settled
from baton_kv_transfer.transports.pair.pair_end import (
    NUM_BUFFERS,
    STALL_TIMEOUT_S,
    Buffer,
    PairEnd,
    Pending,
    Wire,
    again,
)

# Sends that wait for the thread; more wait for their turn.
MAX_QUEUED_SENDS = 8


@dataclass(eq=False, slots=True)
class _Send:
    """One message on its way into a staging buffer."""

    num_bytes: int
    fill: Callable[[Any], None]
    announce: Callable[[int], None]
    read: asyncio.Future[None]  # done once the source is no longer read
    _lock: Lock
    _is_taken: bool = False

    def take(self) -> bool:
        """True for the first who asks: the thread, to fill, or the loop, to withdraw."""
        with self._lock:
            was_taken, self._is_taken = self._is_taken, True
            return not was_taken


@dataclass(slots=True)
class _Sent:
    buffer: Buffer
    pending: Pending
    deadline: float


class SendingEnd(PairEnd):
    """Sends messages in order; while one is on the wire, the next is being put together.

    `on_broken` is called once, on the loop, when the end stops working without having been closed.
    """

    def __init__(
        self,
        wire: Wire[Any],
        on_broken: Callable[[TransferRefused], None],
        *,
        num_buffers: int = NUM_BUFFERS,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        super().__init__(wire, on_broken, num_buffers, stall_timeout_s)
        self._places = asyncio.Semaphore(MAX_QUEUED_SENDS)
        self._sends: set[_Send] = set()
        self._queue: queue.SimpleQueue[_Send | None] = queue.SimpleQueue()
        self._sent: deque[_Sent] = deque()  # oldest first
        self._start("pair-send")

    async def send(
        self, num_bytes: int, fill: Callable[[Any], None], announce: Callable[[int], None]
    ) -> None:
        """Send one message; returns when it has been read from its source, not when it has arrived.

        `fill` puts the message into memory of `num_bytes` (Buffer.content), on the end's thread: it should
        let go of the interpreter's lock where it can (numpy does). `announce` is called with the crc32c, on
        the loop, in the order in which messages go out. Where `send` ends, in whatever way, `fill` runs no
        more. What `fill` raises is raised here, and nothing is sent. Raises TransferRefused where the pair is
        broken or closed, and ValueError for a message that is empty or longer than `max_bytes`.
        """
        if not 0 < num_bytes <= self._max_bytes:
            raise ValueError(f"a message of {num_bytes} bytes where 1 to {self._max_bytes} can be sent")
        async with self._places:
            self._require_whole()
            send = _Send(num_bytes, fill, announce, self._loop.create_future(), Lock())
            self._sends.add(send)
            self._queue.put(send)
            try:
                await asyncio.shield(send.read)
            except asyncio.CancelledError:
                if not send.take():
                    await settled(send.read)
                raise
            finally:
                self._sends.discard(send)

    def _fail_pending(self, reason: TransferRefused) -> None:
        for send in self._sends:
            if not send.read.done() and (self._is_over or send.take()):
                send.read.set_exception(again(reason))

    def _filled(self, send: _Send, crc: int) -> None:
        if self._reason is None:
            try:
                send.announce(crc)
            except Exception as error:
                self._give_up(TransferRefused("pair", f"a message could not be announced: {error!r}"))
        if self._reason is None:
            send.read.set_result(None)
        else:
            send.read.set_exception(again(self._reason))

    def _wake(self) -> None:
        self._queue.put(None)

    # From here on: on the thread.

    def _work(self) -> None:
        while (send := self._next()) is not None:
            while (buffer := self._take_buffer()) is None:
                self._retire()
            if not send.take():  # withdrawn
                self._free.append(buffer)
                continue
            try:
                send.fill(buffer.content(send.num_bytes))
            except Exception as error:
                self._loop.call_soon_threadsafe(send.read.set_exception, error)
                self._free.append(buffer)
                continue
            self._loop.call_soon_threadsafe(self._filled, send, buffer.checksum(send.num_bytes))
            pending = self._wire.send(buffer, send.num_bytes)
            self._sent.append(_Sent(buffer, pending, time.monotonic() + self._stall_timeout_s))

    def _next(self) -> _Send | None:
        """Wait for a command; meanwhile see to it that what is on the wire arrives in time."""
        while True:
            try:
                return self._queue.get(timeout=self._time_left())
            except queue.Empty:
                self._retire()

    def _time_left(self) -> float | None:
        """How long the oldest message on the wire may still take."""
        return max(0.0, self._sent[0].deadline - time.monotonic()) if self._sent else None

    def _retire(self) -> None:
        """Wait until the oldest message has arrived: its buffer is free again."""
        sent = self._sent[0]
        sent.pending.wait(max(0.0, sent.deadline - time.monotonic()))
        self._sent.popleft()
        self._free.append(sent.buffer)

    def _let_go(self) -> None:
        self._sent.clear()
        self._free.clear()
