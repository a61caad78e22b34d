"""The end of a pair that receives: messages land on its thread, are checked there, and come to the loop."""

import contextlib
import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from baton.core.errors import TransferRefused
from baton_kv_transfer.transports.pair.pair_end import (
    NUM_BUFFERS,
    STALL_TIMEOUT_S,
    Buffer,
    PairEnd,
    Pending,
    Wire,
    again,
)

# Messages that a sender may have announced and not sent; it has a few buffers and can't mean more.
MAX_ANNOUNCED = 1024

Token = TypeVar("Token")


class Landed:
    """A message that has arrived; its bytes stay as they are until `release`."""

    __slots__ = ("_release", "payload")

    def __init__(self, payload: Any, release: Callable[[], None]) -> None:
        self.payload = payload  # see Buffer.content
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give the memory back for the messages to come; nothing may look at `payload` any more."""
        release, self._release = self._release, None
        if release is not None:
            release()


@dataclass(frozen=True, slots=True)
class _Expected(Generic[Token]):
    num_bytes: int
    crc32c: int
    token: Token


@dataclass(frozen=True, slots=True)
class _Free:
    buffer: Buffer


class ReceivingEnd(PairEnd, Generic[Token]):
    """Receives the messages that `expect` names, in order.

    `on_landed` is called on the loop, once for each of them and in order: with the bytes, which are right by
    their checksum, or with why there are none. A wrong checksum spoils one message, not the pair. `on_broken`
    is called once, on the loop, when the end stops working without having been closed.
    """

    def __init__(
        self,
        wire: Wire[Any],
        on_landed: Callable[[Token, Landed | TransferRefused], None],
        on_broken: Callable[[TransferRefused], None],
        *,
        num_buffers: int = NUM_BUFFERS,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        super().__init__(wire, on_broken, num_buffers, stall_timeout_s)
        self._on_landed = on_landed
        self._expected: deque[_Expected[Token]] = deque()
        self._queue: queue.SimpleQueue[_Expected[Token] | _Free | None] = queue.SimpleQueue()
        # Of the thread:
        self._announced: deque[_Expected[Token]] = deque()
        self._posted: deque[tuple[_Expected[Token], Buffer, Pending]] = deque()
        self._start("pair-receive")

    def expect(self, num_bytes: int, crc32c: int, token: Token) -> None:
        """The next message has this length and checksum; `token` comes back with it.

        Raises TransferRefused where the pair is broken or closed, and breaks it where the message can't be.
        """
        self._require_whole()
        if not 0 < num_bytes <= self._max_bytes:
            self._give_up(TransferRefused("pair", f"a message of {num_bytes} bytes was announced"))
        elif len(self._expected) == MAX_ANNOUNCED:
            self._give_up(TransferRefused("pair", "messages are announced and not sent"))
        self._require_whole()
        expected = _Expected(num_bytes, crc32c, token)
        self._expected.append(expected)
        self._queue.put(expected)

    def _fail_pending(self, reason: TransferRefused) -> None:
        while self._expected:
            self._on_landed(self._expected.popleft().token, again(reason))

    def _landed(self, buffer: Buffer, crc: int) -> None:
        if not self._expected:  # given up
            return
        expected = self._expected.popleft()
        landed = Landed(buffer.content(expected.num_bytes), lambda: self._queue.put(_Free(buffer)))
        if crc == expected.crc32c:
            self._on_landed(expected.token, landed)
        else:
            landed.release()
            self._on_landed(expected.token, TransferRefused("checksum", "a message arrived corrupted"))

    def _wake(self) -> None:
        self._queue.put(None)

    # From here on: on the thread.

    def _work(self) -> None:
        while self._take_commands():
            if self._posted:
                expected, buffer, pending = self._posted[0]
                pending.wait(self._stall_timeout_s)
                self._posted.popleft()
                if not self._take_commands(can_wait=False):  # the next message travels during the checksum
                    return
                crc = buffer.checksum(expected.num_bytes)
                self._loop.call_soon_threadsafe(self._landed, buffer, crc)

    def _take_commands(self, can_wait: bool = True) -> bool:
        """Take what has come, and wait for more where there is nothing to receive; False: the one to end."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._post()
                match self._queue.get(block=can_wait and not self._posted):
                    case None:
                        return False
                    case _Free(buffer):
                        self._free.append(buffer)
                    case expected:
                        self._announced.append(expected)
        return True

    def _post(self) -> None:
        while self._announced and (buffer := self._take_buffer()) is not None:
            expected = self._announced.popleft()
            self._posted.append((expected, buffer, self._wire.receive(buffer, expected.num_bytes)))

    def _let_go(self) -> None:
        self._announced.clear()
        self._posted.clear()
        self._free.clear()
