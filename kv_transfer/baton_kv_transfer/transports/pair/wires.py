"""Wires over torch.distributed's process groups: Gloo for host memory, NCCL for GPUs."""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from crc32c import crc32c
from torch import Tensor

from baton.core.errors import TransferRefused

RECEIVER, SENDER = 0, 1  # ranks
_DATA, _TAIL, _ACK, _NEVER = range(4)  # tags
# Not all of it is declared for type checkers.
_dist: Any = torch.distributed
_EMPTY = torch.empty(0, dtype=torch.uint8)
_NCCL_POLL_S = 0.0001

Checksum = Callable[[Any], int]  # crc32c of bytes on a device


class Work(Protocol):
    """What torch.distributed says of an operation."""

    def wait(self, timeout: timedelta) -> bool: ...

    def is_completed(self) -> bool: ...


class HostBuffer:
    """Bytes that the processor reads and writes, and the tensor of them that travels."""

    def __init__(self, num_bytes: int) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8)
        self.memory = memoryview(self.tensor.numpy().data)

    def content(self, num_bytes: int) -> memoryview:
        """See Buffer."""
        return self.memory[:num_bytes]

    def checksum(self, num_bytes: int) -> int:
        """See Buffer."""
        return crc32c(self.memory[:num_bytes])


class DeviceBuffer:
    """Bytes on a GPU, which never leave it but for their checksum."""

    def __init__(self, num_bytes: int, device: torch.device, checksum: Checksum) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._checksum = checksum

    def content(self, num_bytes: int) -> Tensor:
        """See Buffer."""
        return self.tensor[:num_bytes]

    def checksum(self, num_bytes: int) -> int:
        """See Buffer."""
        return self._checksum(self.tensor[:num_bytes])


class GlooWire:
    """Messages over Gloo, each with an empty one after it and an empty answer.

    When a connection fails, Gloo tells those who wait for messages that have not begun, and forgets the one
    that it was just reading or writing: who waits for that one waits until his time is over. An empty message
    is never half read. So the receiver waits for the one that follows, and the sender for the answer.
    """

    def __init__(self, store: Any, rank: int, address: str, max_bytes: int, deadline: float) -> None:
        # Options are not kept: they hold the listening socket, and where no group could be made, who then
        # connects would be connected to memory that is free.
        self._group = _dist.ProcessGroupGloo(store, rank, 2, _gloo_options(address, deadline))
        self._peer = 1 - rank
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._is_aborted = False
        self._aborter = threading.Thread(target=self._fail_all, name="pair-abort", daemon=True)
        # Gloo stumbles over a message that is let go before it is written; answers are written in no time.
        self._answers: deque[Work] = deque(maxlen=64)
        _greet(self, rank, deadline)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def new_buffer(self, num_bytes: int | None = None) -> HostBuffer:
        return HostBuffer(num_bytes or self._max_bytes)

    def send(self, buffer: HostBuffer, num_bytes: int) -> "_GlooSend":
        answer = self._group.recv([_EMPTY], self._peer, _ACK)
        data = self._group.send([buffer.tensor[:num_bytes]], self._peer, _DATA)
        return _GlooSend(answer, (data, self._group.send([_EMPTY], self._peer, _TAIL)))

    def receive(self, buffer: HostBuffer, num_bytes: int) -> "_GlooReceive":
        # The whole buffer: Gloo ends the process where a message is longer than what is there to take it.
        data = self._group.recv([buffer.tensor], self._peer, _DATA)
        return _GlooReceive(data, self._group.recv([_EMPTY], self._peer, _TAIL), self._answer)

    def _answer(self) -> None:
        self._answers.append(self._group.send([_EMPTY], self._peer, _ACK))

    def abort(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            self._is_aborted = True
            try:
                self._aborter.start()
            except RuntimeError:  # too late for threads: the interpreter is shutting down
                self._fail_all()

    def _fail_all(self) -> None:
        """Gloo knows no other way: when one operation is late, it closes the connection and fails all."""
        with contextlib.suppress(RuntimeError):
            self._group.recv([_EMPTY], self._peer, _NEVER).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        self.abort()
        with self._lock:
            if self._aborter.ident is not None:
                self._aborter.join()
        self._answers.clear()
        self._group = None


def _gloo_options(address: str, deadline: float) -> Any:
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timeout_until(deadline)
    options._threads = 1  # for collectives, of which there are none
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=address)]  # listens there only
    return options


class _GlooSend:
    def __init__(self, answer: Work, works: tuple[Work, ...]) -> None:
        self._answer = answer
        self._works = works  # kept until they are over

    def wait(self, timeout_s: float) -> None:
        self._answer.wait(_timeout(timeout_s))


class _GlooReceive:
    def __init__(self, data: Work, tail: Work, answer: Callable[[], None]) -> None:
        self._data = data
        self._tail = tail
        self._answer = answer

    def wait(self, timeout_s: float) -> None:
        self._tail.wait(_timeout(timeout_s))
        self._data.wait(_timeout(0.0))  # it is there
        self._answer()


class NcclWire:
    """Messages over NCCL, from GPU to GPU."""

    def __init__(
        self,
        store: Any,
        rank: int,
        device: torch.device,
        checksum: Checksum,
        max_bytes: int,
        deadline: float,
    ) -> None:
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timeout_until(deadline)
        with _no_watchdog():
            self._group = _dist.ProcessGroupNCCL(store, rank, 2, options)
        self._peer = 1 - rank
        self._device = device
        self._checksum = checksum
        self._max_bytes = max_bytes
        # Not the engine's stream: copies would wait for what it computes.
        self._stream = torch.cuda.Stream(device)
        self._is_aborted = threading.Event()
        # The first message connects, and waits for the peer as long as it takes.
        timer = threading.Timer(deadline - time.monotonic(), self._group.abort)
        timer.daemon = True
        timer.start()
        try:
            _greet(self, rank, deadline)
        finally:
            timer.cancel()

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def new_buffer(self, num_bytes: int | None = None) -> DeviceBuffer:
        with torch.cuda.stream(self._stream):  # its own memory: what steps let go of, they may still be using
            return DeviceBuffer(num_bytes or self._max_bytes, self._device, self._checksum)

    def send(self, buffer: DeviceBuffer, num_bytes: int) -> "_NcclPending":
        with torch.cuda.stream(self._stream):
            work = self._group.send([buffer.tensor[:num_bytes]], self._peer, _DATA)
        return _NcclPending(work, self._is_aborted)

    def receive(self, buffer: DeviceBuffer, num_bytes: int) -> "_NcclPending":
        with torch.cuda.stream(self._stream):
            work = self._group.recv([buffer.tensor[:num_bytes]], self._peer, _DATA)
        return _NcclPending(work, self._is_aborted)

    def abort(self) -> None:
        self._is_aborted.set()

    def close(self) -> None:
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                self._group.abort()
            self._group = None


class _NcclPending:
    """Watched from here: torch's own waiting looks every 10 ms, and can't be woken."""

    def __init__(self, work: Work, is_aborted: threading.Event) -> None:
        self._work = work
        self._is_aborted = is_aborted

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._work.is_completed():
            if self._is_aborted.is_set() or time.monotonic() > deadline:
                raise TransferRefused("pair", "the pair was closed, or the peer neither takes nor sends")
            time.sleep(_NCCL_POLL_S)
        self._work.wait(_timeout(0.0))  # raises what went wrong


def _greet(wire: Any, rank: int, deadline: float) -> None:
    """Bring one byte from the sender to the receiver: it shows that both ends are made."""
    buffer = wire.new_buffer(1)
    try:
        pending = wire.send(buffer, 1) if rank == SENDER else wire.receive(buffer, 1)
        pending.wait(deadline - time.monotonic())
    except Exception:
        wire.close()
        raise


_environment = threading.Lock()


@contextlib.contextmanager
def _no_watchdog() -> Iterator[None]:
    """NCCL groups that are made meanwhile have no watchdog, which ends the process when a peer goes away."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    with _environment:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def timeout_until(deadline: float) -> timedelta:
    """For torch, what is left until `deadline` (time.monotonic)."""
    return _timeout(deadline - time.monotonic())


def _timeout(seconds: float) -> timedelta:
    return timedelta(seconds=max(seconds, 0.001))  # 0 would mean the group's own timeout
