"""What a transport is: a Route for each transfer that leaves, and an Intake for each Push call that comes.

The defaults are those of a transport that brings its pages by itself. How to add one is told in
docs/how-to/add-a-transport.md.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket, WorkerTransports
from baton.core.transfer_stats import TransferStats
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.frames import PagesToSend
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transfers.inbound import InboundTransfers
from baton_kv_transfer.transfers.pace import InboundPace

# Connections to one decode server. Measured: a second one adds a tenth to a third, a third one nothing.
NUM_CHANNELS = 2

PushCall = grpc.aio.StreamUnaryCall[bytes, transfer_pb2.PushResult]
PushContext = grpc.aio.ServicerContext[bytes, transfer_pb2.PushResult]
Methods = dict[str, "grpc.RpcMethodHandler[Any, Any]"]


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A transfer that looks for a way."""

    ticket: Ticket
    metadata: tuple[tuple[str, str], ...]  # of every call to the decode server
    calls: list[PushCall]  # of the transfer: the first is there, a route may add more
    push: Callable[[int], PushCall]  # a new call, for a stream of the transfer
    stall_timeout_s: float


class Route:
    """One transfer's way over one transport. Its calls are cancelled by whoever made them."""

    name: str
    failures: frozenset[str] = frozenset()  # refusals' reasons after which another transport may do better
    keeps_pages = False  # pages are read until the transfer has ended, not only until `send` returns
    carrier: str | None = None  # what carries its pages, where the name does not say
    waits_for_open = False  # pages may overtake the frame that opens the transfer: it is to be taken first

    def describe(self, opening: transfer_pb2.Open) -> None:
        """Add to the transfer's first frame what the receiver has to know."""

    async def send(self, pages: PagesToSend) -> int:
        """Send pages; returns how many frames, messages or descriptors that took.

        Raises TransferRefused or an error of gRPC where they can't be sent.
        """
        raise NotImplementedError

    async def finish(self) -> None:
        """All pages were sent; the last frame comes after this."""


@dataclass(frozen=True, slots=True)
class ReceivingWorker:
    """A decode server as those see it who bring pages."""

    inbound: InboundTransfers
    clock: Callable[[], float]
    stats: TransferStats
    pace: InboundPace
    host: str  # an address of this machine, that prefill servers reach
    stall_timeout_s: float  # a prefill server whose pages stop for so long is given up


@dataclass(frozen=True, slots=True)
class IntakeRequest:
    """A Push call whose first frame was taken."""

    opening: transfer_pb2.Open
    layout: KVLayout  # of the sender
    context: PushContext
    stall_timeout_s: float


class Intake:
    """The pages of one Push call on their way in."""

    def __init__(self, request: IntakeRequest) -> None:
        self.request = request

    async def prepare(self) -> None:
        """Do what is needed before pages come. Raises TransferRefused."""

    async def fetch(self, shipped: transfer_pb2.Shipped) -> "Landing":
        """Read pages that a frame names, and check them: for transports that read. Raises TransferRefused."""
        raise TransferRefused("transport", "pages to be read, by a transport that reads none")

    def close(self) -> None:
        """The call is over and no `fetch` is under way."""


class Landing:
    """Bytes that were read, in the transport's own memory: of the host, or a buffer of DevicePages."""

    def __init__(self, memory: Any, give_back: Callable[[], None]) -> None:
        self.memory = memory  # another read's after `release`
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Give the memory back, once. To be called on the event loop."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None


def shipped_place(shipped: transfer_pb2.Shipped, layout: KVLayout) -> FramePlace:
    """Where pages that are to be read belong. Raises TransferRefused where a frame does not hold together."""
    place = wire.place_of(shipped.pages)
    if len(shipped.source_blocks) != place.num_blocks:
        raise TransferRefused("frame", f"{place.num_blocks} blocks, and {len(shipped.source_blocks)} places")
    if place.first_layer + place.num_layers > layout.num_layers:
        raise TransferRefused("range", f"layers up to {place.first_layer + place.num_layers}")
    return place


def _nothing(*_: object) -> None:
    """Nothing is in the way."""


async def _nothing_to_close() -> None:
    """Neither memory nor connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendingSide:
    """One transport of a prefill server."""

    # A transfer's way; None where there is none yet, and its pages go by the registry's last transport.
    route: Callable[[RouteRequest], Route | None]
    close: Callable[[], Awaitable[None]] = _nothing_to_close


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivingSide:
    """One transport of a decode server. Belongs to the event loop that it was made on."""

    intake: Callable[[IntakeRequest], Intake] = Intake
    # Calls of baton.v1.Transfer that only this transport has, by name.
    methods: Callable[[ReceivingWorker], Methods] = lambda worker: {}
    close: Callable[[], Awaitable[None]] = _nothing_to_close


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """What a transport's module has, under the name TRANSPORT."""

    # Both raise StartupError where the transport does not work on this worker.
    sending: Callable[[PageStore, PageReader], SendingSide]
    receiving: Callable[[PageStore, DeviceCopies | None], ReceivingSide]
    # Why a worker can't have it, as words that follow "KV transport NAME"; None: it can.
    lack: Callable[[PageStore], str | None] = _nothing
    # Why two workers that both have it can't use it with each other; None: they can.
    obstacle: Callable[[WorkerTransports, WorkerTransports], str | None] = _nothing
    # What carries pages between two workers, for people, where the transport's name does not say.
    carrier: Callable[[WorkerTransports, WorkerTransports], str | None] = _nothing


def lacks_package(name: str) -> str:
    """What to say of a transport whose package is not installed (Transport.lack)."""
    return f"was asked for, but its package is not installed: pip install 'baton-serve[{name}]'"
