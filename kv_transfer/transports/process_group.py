"""Pairs of torch.distributed process groups: Gloo where the device is "cpu", NCCL where it is "cuda".

Both ends meet at a TCPStore that the receiver serves while they do. The groups are made on it directly: the
process-wide default group, which may be somebody else's, is not touched. Nothing here is authenticated; whoever
can connect to a worker's ports can spoil a pair (checksums find out), as everywhere where NCCL is used.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from baton.core.errors import TransferRefused
from kv_transfer.transports import native_threads
from kv_transfer.transports.group_wires import RECEIVER, SENDER, GlooWire, NcclWire, timeout_until
from kv_transfer.transports.pair_end import NUM_BUFFERS, STALL_TIMEOUT_S, Wire, again, explain
from kv_transfer.transports.receiving_end import Landed, ReceivingEnd
from kv_transfer.transports.sending_end import SendingEnd

# Longest message: large enough that a long prompt's pages go in a few of them.
BUFFER_BYTES = 16 << 20
# Both ends are to have met after it.
MEETING_TIMEOUT_S = 10.0

# Keys of the store besides torch's own.
_MAX_BYTES_KEY, _SENDER_KEY = "baton/max_bytes", "baton/sender"
_ARRIVAL_POLL_S = 0.005

# Not all of it is declared for type checkers.
_dist: Any = torch.distributed

Token = TypeVar("Token")


def is_available(device: str) -> bool:
    """Whether this torch can make pairs for pages on `device`, "cpu" or "cuda"."""
    if not torch.distributed.is_available():
        return False
    return bool(_dist.is_nccl_available() if device == "cuda" else _dist.is_gloo_available())


class Meeting:
    """Where a sending end finds this process: `host` and `port` of a store that is served for one pair."""

    def __init__(self, host: str, *, max_bytes: int = BUFFER_BYTES) -> None:
        """Listen on `host`, an address of this machine that the sender reaches, and on no other.

        Raises TransferRefused where that can't be.
        """
        try:
            listener = _listen(host)
            self.host, self.port = host, int(listener.getsockname()[1])
            self._address = str(listener.getsockname()[0])
            self._store: Any = _dist.TCPStore(
                self._address,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=MEETING_TIMEOUT_S),
                master_listen_fd=listener.detach(),
            )
            self._store.set(_MAX_BYTES_KEY, str(max_bytes))
        except (OSError, RuntimeError) as error:
            raise TransferRefused("pair", f"can't listen on {host}: {explain(error)}") from None
        self._max_bytes = max_bytes

    async def receiving_end(
        self,
        device: str,
        on_landed: Callable[[Token, Landed | TransferRefused], None],
        on_broken: Callable[[TransferRefused], None],
        *,
        meeting_timeout_s: float = MEETING_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        num_buffers: int = NUM_BUFFERS,
    ) -> ReceivingEnd[Token]:
        """Wait for the sender and make this end; may be called once. See ReceivingEnd.

        Raises TransferRefused where the sender does not come in time. The store is closed in any case.
        """
        wire = await _made(lambda is_unwanted: self._meet(device, meeting_timeout_s, is_unwanted))
        return ReceivingEnd(
            wire, on_landed, on_broken, num_buffers=num_buffers, stall_timeout_s=stall_timeout_s
        )

    def close(self) -> None:
        """Serve the store no longer."""
        self._store = None

    def _meet(self, device: str, timeout_s: float, is_unwanted: threading.Event) -> Wire[Any]:
        deadline = time.monotonic() + timeout_s
        store, self._store = self._store, None
        if store is None:
            raise TransferRefused("pair", "the meeting is over")
        # The store would wait, but not be woken, and writes a stack trace when nobody comes.
        while not store.check([_SENDER_KEY]):
            if is_unwanted.wait(_ARRIVAL_POLL_S) or time.monotonic() > deadline:
                raise TransferRefused("pair", "the sender did not come")
        # A store of its own for the group, so that the one that is served ends with the meeting.
        return _make(store.clone(), RECEIVER, device, self._address, self._max_bytes, deadline)


async def sending_end(
    host: str,
    port: int,
    device: str,
    on_broken: Callable[[TransferRefused], None],
    *,
    max_bytes: int = BUFFER_BYTES,
    meeting_timeout_s: float = MEETING_TIMEOUT_S,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    num_buffers: int = NUM_BUFFERS,
) -> SendingEnd:
    """Meet the receiver that serves a Meeting at `host` and `port`. See SendingEnd.

    Messages are as long as both ends have buffers for: see SendingEnd.max_bytes. Raises TransferRefused where
    the receiver can't be reached in time.
    """
    wire = await _made(lambda is_unwanted: _meet_receiver(host, port, device, max_bytes, meeting_timeout_s))
    return SendingEnd(wire, on_broken, num_buffers=num_buffers, stall_timeout_s=stall_timeout_s)


def _meet_receiver(host: str, port: int, device: str, max_bytes: int, timeout_s: float) -> Wire[Any]:
    deadline = time.monotonic() + timeout_s
    # Also because the store writes stack traces when it can't connect.
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        address = str(connection.getsockname()[0])
    store = _dist.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timeout_until(deadline)
    )
    max_bytes = min(max_bytes, int(store.get(_MAX_BYTES_KEY)))
    store.set(_SENDER_KEY, "")
    return _make(store, SENDER, device, address, max_bytes, deadline)


def _make(store: Any, rank: int, device: str, address: str, max_bytes: int, deadline: float) -> Wire[Any]:
    if device == "cuda":
        gpu = torch.device("cuda", torch.cuda.current_device())
        return NcclWire(store, rank, gpu, max_bytes, deadline)
    return GlooWire(store, rank, address, max_bytes, deadline)


def _listen(host: str) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


async def _made(make: Callable[[threading.Event], Wire[Any]]) -> Wire[Any]:
    """Make a wire on a thread; where nobody waits for it any more, it is closed as soon as it is made."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[Wire[Any]] = loop.create_future()
    is_unwanted = threading.Event()

    def settle(outcome: Wire[Any] | TransferRefused) -> None:
        if isinstance(outcome, TransferRefused):
            if not made.done():
                made.set_exception(outcome)
        elif made.done():
            native_threads.start("pair-close", outcome.close, lambda: None)
        else:
            made.set_result(outcome)

    def run() -> None:
        outcome: Wire[Any] | TransferRefused
        try:
            outcome = make(is_unwanted)
        except TransferRefused as error:
            outcome = again(error)
        except Exception as error:
            outcome = TransferRefused("pair", f"no pair could be made: {explain(error)}")
        try:
            loop.call_soon_threadsafe(settle, outcome)
        except RuntimeError:  # the loop is closed
            if not isinstance(outcome, TransferRefused):
                outcome.close()

    native_threads.start("pair-meet", run, is_unwanted.set)
    try:
        return await made
    except asyncio.CancelledError:
        is_unwanted.set()
        if made.done() and not made.cancelled() and made.exception() is None:
            native_threads.start("pair-close", made.result().close, lambda: None)
        raise
