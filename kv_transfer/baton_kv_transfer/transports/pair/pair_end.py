"""What the two ends of a pair have in common: a thread, a wire, and how it all ends.

One end sends byte buffers in order, the other receives them. What lies between is a `Wire`, which blocks;
`process_group.py` makes real ones. An end belongs to the event loop it was made on. Its thread owns the wire
and the buffers, takes commands from a queue and answers through `call_soon_threadsafe`; nothing of the loop's
is touched by the thread, and nothing of the thread's by the loop.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from baton.core.errors import TransferRefused
from baton_kv_transfer.transports.pair import native_threads

# Memory of one end: so many buffers, made when they are first needed.
NUM_BUFFERS = 3
# A peer that neither takes nor sends anything for this long is given up.
STALL_TIMEOUT_S = 30.0
# `close` waits for the thread so long, and then leaves it to end by itself.
CLOSE_TIMEOUT_S = 5.0


class Buffer(Protocol):
    """Memory that a wire can send from and receive into."""

    def content(self, num_bytes: int) -> Any:
        """Its first bytes: host memory, or those of a device as a tensor of bytes."""
        ...

    def checksum(self, num_bytes: int) -> int:
        """crc32c (RFC 3720) of its first bytes."""
        ...


class Pending(Protocol):
    """A message under way."""

    def wait(self, timeout_s: float) -> None:
        """Return once the buffer can be used again, or read. Raises where that takes longer or can't be."""
        ...


BufferT = TypeVar("BufferT", bound=Buffer)


class Wire(Protocol[BufferT]):
    """Brings messages from one rank to the other, in order. One thread uses it; any may `abort` it."""

    @property
    def max_bytes(self) -> int:
        """The longest message that both ends have buffers for."""
        ...

    def new_buffer(self) -> BufferT:
        """A buffer of `max_bytes`."""
        ...

    def send(self, buffer: BufferT, num_bytes: int) -> Pending:
        """Begin to send the buffer's first bytes."""
        ...

    def receive(self, buffer: BufferT, num_bytes: int) -> Pending:
        """Begin to receive a message of `num_bytes`."""
        ...

    def abort(self) -> None:
        """Make every wait fail now. Returns at once; may be called at any time and more than once."""
        ...

    def close(self) -> None:
        """Let go of everything; returns soon, whatever the peer does."""
        ...


class PairEnd:
    """What both ends have in common: the thread, the buffers and how it all ends."""

    def __init__(
        self,
        wire: Wire[Any],
        on_broken: Callable[[TransferRefused], None],
        num_buffers: int,
        stall_timeout_s: float,
    ) -> None:
        self._wire = wire
        self._on_broken = on_broken
        self._stall_timeout_s = stall_timeout_s
        self._max_bytes = wire.max_bytes
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._is_over = False  # the thread works no more
        self._has_ended = asyncio.Event()
        self._reason: TransferRefused | None = None  # why nothing works any more
        # Of the thread:
        self._free: list[Buffer] = []
        self._num_unmade = num_buffers

    @property
    def max_bytes(self) -> int:
        """The longest message that both ends have buffers for."""
        return self._max_bytes

    @property
    def is_whole(self) -> bool:
        """Whether it still works, as far as the loop has been told."""
        return self._reason is None

    async def close(self) -> None:
        """End the thread and let go of the wire: what is under way fails. May be called more than once."""
        self._is_closed = True
        self._give_up(TransferRefused("pair", "the pair was closed"))
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._has_ended.wait()
        except TimeoutError:
            self._fail_pending(TransferRefused("pair", "the pair was closed"))

    def _start(self, name: str) -> None:
        native_threads.start(name, self._run, self._stop)

    def _give_up(self, reason: TransferRefused) -> None:
        if self._reason is None:
            self._reason = reason
            self._stop()

    def _require_whole(self) -> None:
        if self._reason is not None:
            raise again(self._reason)

    def _finish(self, error: TransferRefused) -> None:
        self._reason = self._reason or error
        self._is_over = True
        self._fail_pending(self._reason)
        if not self._is_closed:
            self._on_broken(again(self._reason))

    def _fail_pending(self, reason: TransferRefused) -> None:
        """Give up what is not done, as far as the thread is not at it."""
        raise NotImplementedError

    def _stop(self) -> None:
        """End the thread soon; called on any thread."""
        self._wake()
        self._wire.abort()

    def _wake(self) -> None:
        raise NotImplementedError

    # From here on: on the thread.

    def _run(self) -> None:
        error = TransferRefused("pair", "the pair was closed")
        try:
            self._work()
        except TransferRefused as refusal:
            error = again(refusal)
        except Exception as failure:  # torch says RuntimeError, and others
            error = TransferRefused("pair", f"the pair broke: {explain(failure)}")
        self._tell(self._finish, error)
        self._let_go()
        self._wire.close()
        self._tell(self._has_ended.set)

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, *args)

    def _work(self) -> None:
        """Carry out commands until the one to end."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Drop buffers and what is under way."""
        raise NotImplementedError

    def _take_buffer(self) -> Buffer | None:
        if self._free:
            return self._free.pop()
        if self._num_unmade == 0:
            return None
        self._num_unmade -= 1
        buffer: Buffer = self._wire.new_buffer()
        return buffer


def breaking(broken: asyncio.Future[None]) -> Callable[[TransferRefused], None]:
    """An `on_broken` that fails a future."""

    def on_broken(error: TransferRefused) -> None:
        if not broken.done():
            broken.set_exception(error)

    return on_broken


def explain(error: Exception) -> str:
    """What a person needs of torch's words: not the place in its source, nor its guesses and stack traces."""
    words = re.sub(r"^\[[^\]]*\] ", "", str(error) or type(error).__name__)
    return words.splitlines()[0].split(". ")[0].rstrip(".")


def again(error: TransferRefused) -> TransferRefused:
    """A new error for each who is told: one that is raised twice shows both places."""
    return TransferRefused(error.reason, str(error))
