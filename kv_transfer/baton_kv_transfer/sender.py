"""The prefill side of transfers: each is fed while its prompt still computes."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from baton.core.errors import TransferRefused
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferReport, TransferStats
from baton.rpc import codec
from baton.rpc.auth import credentials
from baton.rpc.errors import REFUSAL_REASON
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages.frames import PagesToSend, num_payload_bytes
from baton_kv_transfer.peer import Line, Peer
from baton_kv_transfer.transfers.outbound import OutboundTransfer
from baton_kv_transfer.transports.base import PushCall, Route, RouteRequest
from baton_kv_transfer.transports.registry import SendingTransports

# A decode server that can't be reached for this long is given up.
CONNECT_TIMEOUT_S = 5.0
# What grpc.aio makes of a call that the other side ended while a frame was being written.
_LOST_WORDS = "Internal error from Core"


@dataclass(slots=True)
class _Times:
    """When one transfer was where, by time.monotonic()."""

    first_pages: float | None = None
    computed: float | None = None  # the prompt was computed: what takes longer is waited for

    def seconds(self, end: float) -> tuple[float, float]:
        """The whole transfer's duration, and what of it was exposed."""
        start = end if self.first_pages is None else self.first_pages
        computed = end if self.computed is None else self.computed
        return end - start, end - max(start, computed)


class OutgoingTransfer:
    """One request's pages on their way out.

    `send_pages`, then `commit` or `withdraw`, may be called while `run` is at work; each hold on pages that
    was given to it is given back through `release` exactly once, whatever happens.
    """

    def __init__(self, outbound: OutboundTransfer, sender: "TransferSender", peer: Peer) -> None:
        self._outbound = outbound
        self._sender = sender
        self._peer = peer
        self._wake = asyncio.Event()
        self._times = _Times()
        self._num_bytes = 0

    @property
    def first_block(self) -> int:
        """Of the prompt, in this server's blocks, that decode misses."""
        ticket, layout = self._outbound.ticket, self._sender.store.layout
        if ticket.first_token >= ticket.num_tokens:  # nothing at all, and no part of our last block
            return layout.blocks_for(ticket.num_tokens)
        return ticket.first_token // layout.block_size

    def send_pages(self, place: FramePlace, blocks: tuple[int, ...]) -> None:
        """Queue pages that are final; `place` counts this server's blocks of the request."""
        if self._times.first_pages is None and blocks:
            self._times.first_pages = time.monotonic()
        self._outbound.add_pages(PagesToSend(place, blocks))
        self._wake.set()

    def commit(self, first_tokens: list[int], finished_choices: list[int]) -> None:
        """The prompt is computed; all pages are queued."""
        self._times.computed = time.monotonic()
        self._outbound.commit(first_tokens, finished_choices)
        self._wake.set()

    def withdraw(self) -> None:
        """The first tokens ended the request: decode need not wait."""
        self._outbound.withdraw()
        self._wake.set()

    async def run(self) -> TransferReport:
        """Push until the last frame is acknowledged.

        Raises TransferRefused where the receiver refuses, stalls or goes away.
        """
        async with self._peer.line() as line:
            return await self._run(line)

    async def _run(self, line: Line) -> TransferReport:
        stats = self._sender.stats
        calls = [line.push(0)]
        route = self._sender.route(self._outbound.ticket, self._peer, line, calls)
        try:
            await self._push(calls, route)
            stats.outcomes[self._outbound.outcome] += 1
            return self._report(route)
        except (TransferRefused, grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            stats.outcomes["refused"] += 1
            refusal = await _refusal(calls, error, self._peer.address)
            # Decode's reads and the wait for its answer may run out of time in either order.
            is_late_read = route.keeps_pages and isinstance(error, TimeoutError)
            if refusal.reason in {"transport", *route.failures} or is_late_read:
                self._peer.note_failure(route.name, self._outbound.ticket.epoch)
            raise refusal from None
        except asyncio.CancelledError:
            stats.outcomes["aborted"] += 1
            raise
        finally:
            for call in calls:
                call.cancel()
            self._outbound.close()
            self._count(route)

    async def _push(self, calls: Sequence[PushCall], route: Route) -> None:
        for stream, call in enumerate(calls):
            # Not wait_for: before Python 3.12 it loses a cancellation that comes as its awaitable completes.
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.write(self._opening(stream, route))
                if route.waits_for_open:
                    await call.initial_metadata()
        while isinstance(item := await self._next(), PagesToSend):
            self._sent(item, await route.send(item), route)
        await route.finish()
        async with asyncio.timeout(self._sender.stall_timeout_s):
            await calls[0].write(item.SerializeToString())
            await calls[0].done_writing()
            await calls[0]

    async def _next(self) -> PagesToSend | transfer_pb2.TransferFrame:
        while (item := self._outbound.next()) is None:
            self._wake.clear()
            await self._wake.wait()
        return item

    def _opening(self, stream: int, route: Route) -> bytes:
        frame = self._outbound.frame()
        frame.open.layout.CopyFrom(codec.layout_to_proto(self._sender.store.layout))
        frame.open.protocol_version = codec.PROTOCOL_VERSION
        frame.open.transport = route.name
        frame.open.stream = stream
        route.describe(frame.open)
        return frame.SerializeToString()

    def _sent(self, pages: PagesToSend, num_operations: int, route: Route) -> None:
        transport = self._sender.stats.transports[route.name]
        num_bytes = num_payload_bytes(self._sender.store.layout, pages.place)
        self._num_bytes += num_bytes
        transport.num_bytes += num_bytes
        transport.num_operations += num_operations
        if not route.keeps_pages:
            self._outbound.done_with(pages.blocks)

    def _count(self, route: Route) -> None:
        transport, report = self._sender.stats.transports[route.name], self._report(route)
        transport.num_transfers += 1
        transport.seconds += report.seconds
        transport.exposed_seconds += report.exposed_seconds

    def _report(self, route: Route) -> TransferReport:
        name = route.carrier or route.name
        return TransferReport(name, self._num_bytes, *self._times.seconds(time.monotonic()))


class TransferSender:
    """Begins transfers to whichever decode server a ticket names."""

    def __init__(
        self,
        store: PageStore,
        cluster_token: str,
        stats: TransferStats,
        transports: SendingTransports,
        *,
        asked_transport: str | None = None,
        stall_timeout_s: float,
    ) -> None:
        self.store = store
        self.stats = stats
        self.stall_timeout_s = stall_timeout_s  # a receiver that takes nothing for so long is given up
        self._metadata = credentials(cluster_token)
        self._transports = transports
        self._asked_transport = asked_transport
        self._peers: dict[str, Peer] = {}

    def begin(self, ticket: Ticket, release: Callable[[tuple[int, ...]], None]) -> OutgoingTransfer:
        """A transfer under `ticket`; the caller owns the task that runs it.

        Raises TransferRefused where decode speaks an older protocol, can't convert this server's pages, or
        shares no transport.
        """
        if ticket.protocol_version < codec.PROTOCOL_VERSION:
            raise TransferRefused(
                "version",
                f"the decode server speaks protocol version {ticket.protocol_version}, this prefill server "
                f"{codec.PROTOCOL_VERSION}: run the same version of Baton on both",
            )
        self.store.layout.require_convertible_to(ticket.layout)
        peer = self._peers.get(ticket.address)
        if peer is None:
            peer = self._peers[ticket.address] = Peer(ticket.address, self._metadata)
        peer.choose(self._transports.offer, ticket, self._asked_transport)
        return OutgoingTransfer(OutboundTransfer(ticket, release, self.store.layout.scales), self, peer)

    def route(self, ticket: Ticket, peer: Peer, line: Line, calls: list[PushCall]) -> Route:
        """The way of a transfer's pages; may add calls to the one that there is."""
        choice = peer.choose(self._transports.offer, ticket, self._asked_transport)
        request = RouteRequest(ticket, self._metadata, calls, line.push, self.stall_timeout_s)
        return self._transports.route(choice.name, request)

    async def close(self) -> None:
        """Close every connection."""
        for peer in self._peers.values():
            await peer.close()
        await self._transports.close()


async def _refusal(calls: Sequence[PushCall], error: Exception, address: str) -> TransferRefused:
    """Why a push failed: the receiver's own words where it said some."""
    if isinstance(error, TransferRefused):
        return error
    if isinstance(error, TimeoutError):
        message = f"the decode server at {address} can't be reached, or takes nothing any more"
        return TransferRefused("push", message)
    for call in calls:
        if call.done() and (details := await call.details()) and details != _LOST_WORDS:
            trailers = dict(await call.trailing_metadata() or ())
            return TransferRefused(str(trailers.get(REFUSAL_REASON, "push")), details)
    return TransferRefused("push", "the decode server ended the transfer, and its log says why")
