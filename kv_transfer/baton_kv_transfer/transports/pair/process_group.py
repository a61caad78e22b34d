"""Pairs of torch.distributed process groups: Gloo where the device is "cpu", NCCL where it is "cuda".

Both ends meet on a port that the receiver serves while they do. The groups are made directly; the default
group of the process, which may be somebody else's, is not touched. Neither the port nor the groups know who
connects to them, as everywhere with NCCL: pairs are for networks of the cluster's machines alone.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from baton.core.errors import TransferRefused
from baton_kv_transfer.transports.pair import native_threads
from baton_kv_transfer.transports.pair.pair_end import NUM_BUFFERS, STALL_TIMEOUT_S, Wire, explain
from baton_kv_transfer.transports.pair.receiving_end import Landed, ReceivingEnd
from baton_kv_transfer.transports.pair.sending_end import SendingEnd
from baton_kv_transfer.transports.pair.wires import RECEIVER, SENDER, Checksum, GlooWire, NcclWire

# Longest message: large enough that a long prompt's pages go in a few of them.
BUFFER_BYTES = 16 << 20
# Both ends are to have met after it, and are given up a little later.
MEETING_TIMEOUT_S = 10.0
_GRACE_S = 0.5

_LENGTHS = struct.Struct("!II")  # of a key and a value
_MAX_VALUE_BYTES = 1 << 20

# Not all of it is declared for type checkers.
_dist: Any = torch.distributed
_Store: Any = getattr(_dist, "Store", object)

Token = TypeVar("Token")


class Meeting:
    """Where a sending end finds this process: `host` and `port`, served for one pair."""

    def __init__(self, host: str, *, max_bytes: int = BUFFER_BYTES) -> None:
        """Listen on `host`, an address of this machine that the sender reaches, and on no other.

        Raises TransferRefused where that can't be.
        """
        try:
            self._listener = _listen(host)
        except OSError as error:
            raise TransferRefused("pair", f"can't listen on {host}: {explain(error)}") from None
        self.host = host
        self.port = int(self._listener.getsockname()[1])
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
        checksum: Checksum | None = None,
    ) -> ReceivingEnd[Token]:
        """Wait for the sender and make this end; the meeting is over then. See ReceivingEnd.

        `checksum`: of bytes on a device, where that is not "cpu".

        Raises TransferRefused where the sender does not come in time.
        """
        deadline = time.monotonic() + meeting_timeout_s
        try:
            async with asyncio.timeout(meeting_timeout_s):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        except TimeoutError:
            raise TransferRefused("pair", "the sender did not come") from None
        finally:
            self.close()
        wire = await _WireMaker(
            lambda: connection, RECEIVER, device, checksum, self._max_bytes, deadline
        ).wire()
        return ReceivingEnd(
            wire, on_landed, on_broken, num_buffers=num_buffers, stall_timeout_s=stall_timeout_s
        )

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()


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
    checksum: Checksum | None = None,
) -> SendingEnd:
    """Meet the receiver that serves a Meeting at `host` and `port`. See SendingEnd.

    Messages are as long as both ends have buffers for: see SendingEnd.max_bytes. `checksum`: of bytes on a
    device, where that is not "cpu". Raises TransferRefused where
    the receiver can't be reached in time.
    """
    deadline = time.monotonic() + meeting_timeout_s

    def connect() -> socket.socket:
        return socket.create_connection((host, port), timeout=meeting_timeout_s)

    wire = await _WireMaker(connect, SENDER, device, checksum, max_bytes, deadline).wire()
    return SendingEnd(wire, on_broken, num_buffers=num_buffers, stall_timeout_s=stall_timeout_s)


class _WireMaker:
    """Makes a wire on a thread; where nobody waits for it any more, it is closed as soon as it is made."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        rank: int,
        device: str,
        checksum: Checksum | None,
        max_bytes: int,
        deadline: float,
    ) -> None:
        self._connect = connect
        self._rank = rank
        self._device = torch.device(device)
        self._checksum = checksum
        self._max_bytes = max_bytes
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Future[Wire[Any]] = self._loop.create_future()
        self._is_unwanted = False
        self._store: _MeetingStore | None = None

    async def wire(self) -> Wire[Any]:
        native_threads.start("pair-meet", self._run, self._stop)
        try:
            # NCCL may overlook the deadline.
            async with asyncio.timeout(self._deadline - time.monotonic() + _GRACE_S):
                return await self._made
        except BaseException as error:
            self._stop()
            if self._made.done() and not self._made.cancelled() and self._made.exception() is None:
                _close_aside(self._made.result())
            self._made.cancel()
            if isinstance(error, TimeoutError):
                raise TransferRefused("pair", "the peer did not answer in time") from None
            raise

    def _settle(self, outcome: Wire[Any] | TransferRefused) -> None:
        if self._made.done():
            if not isinstance(outcome, TransferRefused):
                _close_aside(outcome)
        elif isinstance(outcome, TransferRefused):
            self._made.set_exception(outcome)
        else:
            self._made.set_result(outcome)

    def _stop(self) -> None:
        """Called on any thread."""
        self._is_unwanted = True
        if self._store is not None:
            self._store.interrupt()

    # From here on: on the thread.

    def _run(self) -> None:
        try:
            with self._connect() as connection:
                self._store = _MeetingStore(connection, self._deadline)
                if self._is_unwanted:
                    self._store.interrupt()
                outcome: Wire[Any] | TransferRefused = self._make(connection, self._store)
        except Exception as error:
            outcome = TransferRefused("pair", f"no pair could be made: {explain(error)}")
        try:
            self._loop.call_soon_threadsafe(self._settle, outcome)
        except RuntimeError:  # the loop is closed
            if not isinstance(outcome, TransferRefused):
                outcome.close()

    def _make(self, connection: socket.socket, store: "_MeetingStore") -> Wire[Any]:
        store.set(f"max_bytes/{self._rank}", str(self._max_bytes).encode())
        max_bytes = min(self._max_bytes, int(store.get(f"max_bytes/{1 - self._rank}")))
        if self._device.type == "cuda":
            if self._checksum is None:
                raise TransferRefused("pair", "a pair between GPUs, but these pages lie on none")
            device = torch.device("cuda", self._device.index or 0)
            return NcclWire(store, self._rank, device, self._checksum, max_bytes, self._deadline)
        # Gloo is to use the interface that faces the peer, whatever this machine is called.
        address = str(connection.getsockname()[0])
        return GlooWire(store, self._rank, address, max_bytes, self._deadline)


def _close_aside(wire: Wire[Any]) -> None:
    native_threads.start("pair-close", wire.close, lambda: None)


class _MeetingStore(_Store):  # type: ignore[misc]
    """What one end sets, the other can get: over the connection on which they met.

    Torch's TCPStore listens on every interface, waits for ever for a server that is stopped, and writes stack
    traces to stderr. One thread uses it; any may interrupt.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        super().__init__()
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        self._connection = connection
        self._deadline = deadline
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        name = key.encode()
        self._connection.sendall(_LENGTHS.pack(len(name), len(value)) + name + value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], _: timedelta | None = None) -> None:
        while not self.check(keys):
            sizes = _LENGTHS.unpack(self._read(_LENGTHS.size))
            name, value = (self._read(size) for size in sizes)
            self._values[name.decode()] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _read(self, num_bytes: int) -> bytes:
        if num_bytes > _MAX_VALUE_BYTES:
            raise ConnectionError("something else than a sender has connected")
        read = bytearray()
        while len(read) < num_bytes:
            self._connection.settimeout(max(self._deadline - time.monotonic(), 0.001))
            more = self._connection.recv(num_bytes - len(read))
            if not more:
                raise ConnectionError("the peer has gone")
            read += more
        return bytes(read)


def _listen(host: str) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
