"""One decode server as a prefill server sees it: its channels, and the transport that the two share."""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from baton.core.ticket import Ticket, WorkerTransports
from baton.rpc.limits import CHANNEL_OPTIONS
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.transports.base import NUM_CHANNELS, PushCall
from baton_kv_transfer.transports.choice import Choice, choose
from baton_kv_transfer.transports.registry import row_of

logger = logging.getLogger(__name__)

# A transport that failed is tried again after it: two machines without RDMA between them won't get any.
AVOID_FAILED_S = 60.0


class Line:
    """Connections to one decode server, which transfers share: each enters for as long as it lasts.

    After one has failed there, for whatever reason, no other begins there. HTTP/2 keeps state for as long as
    a connection lasts: where frames begin, the next stream's number, tables of headers. Once that is wrong,
    every later call fails or is ignored, while pings go on being answered.
    """

    def __init__(self, address: str, metadata: tuple[tuple[str, str], ...]) -> None:
        self.channels = [
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(NUM_CHANNELS)
        ]
        self.has_failed = False
        self._metadata = metadata
        self._num_transfers = 0

    async def __aenter__(self) -> Self:
        self._num_transfers += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._num_transfers -= 1
        self.has_failed = self.has_failed or isinstance(error, Exception)  # an abort is none
        if self.has_failed and self._num_transfers == 0:
            await self.close()

    def push(self, stream: int) -> PushCall:
        """A new Push call, for one stream of a transfer."""
        method: Callable[..., PushCall] = self.channels[stream % NUM_CHANNELS].stream_unary(
            wire.PUSH_METHOD,
            request_serializer=_as_it_is,
            response_deserializer=transfer_pb2.PushResult.FromString,
        )
        # A decode server that has come back on its address is to be found though it was away a moment ago.
        return method(metadata=self._metadata, wait_for_ready=True)

    async def close(self) -> None:
        """Close every connection."""
        for channel in self.channels:
            await channel.close(None)


class Peer:
    """One decode server: the line to it, and the transport."""

    def __init__(self, address: str, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata
        self._line = Line(address, metadata)
        self._choice: Choice | None = None  # as it was logged last
        # Transports that are not used until a time, with the decode server of an epoch.
        self._failed: dict[tuple[str, int], float] = {}
        self.address = address

    def line(self) -> Line:
        """The connections for a new transfer: none on which another has failed."""
        if self._line.has_failed:
            self._line = Line(self.address, self._metadata)
        return self._line

    def choose(self, mine: WorkerTransports, ticket: Ticket, asked: str | None) -> Choice:
        """The transport for a ticket's transfer; logged when it is new. Raises TransferRefused."""
        now = time.monotonic()
        self._failed = {key: until for key, until in self._failed.items() if until > now}
        failed = frozenset(name for name, epoch in self._failed if epoch == ticket.epoch)
        choice = choose(mine, ticket.transports, asked, failed)
        if choice != self._choice:
            carrier = row_of(choice.name).load().carrier(mine, ticket.transports)
            name = choice.name if carrier is None else f"{choice.name}, which is {carrier} here"
            logger.info("KV transport to %s: %s (%s)", self.address, name, choice.reason)
            self._choice = choice
        return choice

    def note_failure(self, transport: str, epoch: int) -> None:
        """A transport does not work: leave it alone for a while, where there is another."""
        self._failed[transport, epoch] = time.monotonic() + AVOID_FAILED_S

    async def close(self) -> None:
        """Close every connection."""
        await self._line.close()


def _as_it_is(wire_bytes: bytes) -> bytes:
    return wire_bytes
