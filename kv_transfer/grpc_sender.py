"""The prefill side of a transfer over gRPC: one Push call a request, fed while the prompt still computes."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from baton.core.errors import TransferRefused
from baton.core.ports import PageStore
from baton.rpc import codec
from baton.rpc.auth import credentials
from baton.rpc.limits import CHANNEL_OPTIONS
from baton.rpc.ticket import Ticket
from baton.v1 import transfer_pb2, transfer_pb2_grpc
from kv_transfer.frames import frame_places, pack
from kv_transfer.stats import TransferStats

logger = logging.getLogger(__name__)

# A receiver that takes no frame for this long is given up.
STALL_TIMEOUT_S = 30.0
# A decode server that can't be reached for this long is given up.
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Pages:
    first_block: int
    blocks: tuple[int, ...]


class OutgoingTransfer:
    """One request's pages on their way out.

    `send_pages`, then `commit` or `withdraw`, may be called while `run` is at work; each page that was given
    to it is given back through `release` exactly once, whatever happens.
    """

    def __init__(
        self,
        ticket: Ticket,
        store: PageStore,
        stub: transfer_pb2_grpc.TransferStub,
        metadata: tuple[tuple[str, str], ...],
        release: Callable[[tuple[int, ...]], None],
        stats: TransferStats,
    ) -> None:
        self._ticket = ticket
        self._store = store
        self._stub = stub
        self._metadata = metadata
        self._release = release
        self._stats = stats
        # Bounded by what is put in: the request's blocks, each once, and one last frame.
        self._queue: asyncio.Queue[_Pages | transfer_pb2.TransferFrame] = asyncio.Queue()
        self._is_over = False
        self._outcome = "committed"

    def send_pages(self, first_block: int, blocks: tuple[int, ...]) -> None:
        """Queue pages that are final; they are the request's blocks from `first_block` on."""
        if self._is_over:
            self._release(blocks)
        elif blocks:
            self._queue.put_nowait(_Pages(first_block, blocks))

    def commit(self, first_tokens: list[int], finished_choices: list[int]) -> None:
        """The prompt is computed; all pages are queued."""
        frame = self._frame()
        frame.commit.first_tokens.extend(first_tokens)
        frame.commit.finished_choices.extend(finished_choices)
        self._queue.put_nowait(frame)

    def withdraw(self) -> None:
        """The first tokens ended the request: decode need not wait."""
        frame = self._frame()
        frame.withdraw.SetInParent()
        self._outcome = "withdrawn"
        self._queue.put_nowait(frame)

    async def run(self) -> None:
        """Push until the last frame is acknowledged.

        Raises TransferRefused where the receiver refuses, stalls or goes away.
        """
        # A decode server that has come back on its address is to be found though it was away a moment ago.
        call = self._stub.Push(metadata=self._metadata, wait_for_ready=True)
        try:
            await self._push(call)
            self._stats.outcomes[self._outcome] += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            self._stats.outcomes["refused"] += 1
            raise TransferRefused("push", await _explain(call, error, self._ticket.address)) from None
        except asyncio.CancelledError:
            self._stats.outcomes["aborted"] += 1
            raise
        finally:
            call.cancel()
            self._close()

    async def _push(self, call: "_PushCall") -> None:
        opening = self._frame()
        opening.open.layout.CopyFrom(codec.layout_to_proto(self._store.layout))
        # Not wait_for: before Python 3.12 it loses a cancellation that comes as its awaitable completes.
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await call.write(opening)
        while True:
            item = await self._queue.get()
            if not isinstance(item, _Pages):
                break
            await self._push_pages(call, item)
        async with asyncio.timeout(STALL_TIMEOUT_S):
            await call.write(item)
            await call.done_writing()
            await call

    async def _push_pages(self, call: "_PushCall", pages: _Pages) -> None:
        try:
            for place in frame_places(self._store.layout, pages.first_block, len(pages.blocks)):
                offset = place.first_block - pages.first_block
                frame = self._frame()
                frame.pages.CopyFrom(
                    pack(self._store, pages.blocks[offset : offset + place.num_blocks], place)
                )
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    await call.write(frame)
                self._stats.num_bytes += len(frame.pages.payload)
        finally:
            self._release(pages.blocks)

    def _frame(self) -> transfer_pb2.TransferFrame:
        return transfer_pb2.TransferFrame(transfer_id=self._ticket.transfer_id, epoch=self._ticket.epoch)

    def _close(self) -> None:
        self._is_over = True
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, _Pages):
                self._release(item.blocks)


class GrpcSender:
    """Channels to the decode servers that this prefill server sends to, one each, made on first use."""

    def __init__(self, store: PageStore, cluster_token: str, stats: TransferStats) -> None:
        self._store = store
        self._metadata = credentials(cluster_token)
        self._stats = stats
        self._channels: dict[str, grpc.aio.Channel] = {}

    def begin(self, ticket: Ticket, release: Callable[[tuple[int, ...]], None]) -> OutgoingTransfer:
        """A transfer under `ticket`; the caller owns the task that runs it.

        Raises TransferRefused where the pages on both sides differ in layout.
        """
        self._store.layout.require_same(ticket.layout)
        channel = self._channels.get(ticket.address)
        if channel is None:
            channel = grpc.aio.insecure_channel(ticket.address, options=CHANNEL_OPTIONS)
            self._channels[ticket.address] = channel
        stub = transfer_pb2_grpc.TransferStub(channel)
        return OutgoingTransfer(ticket, self._store, stub, self._metadata, release, self._stats)

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            await channel.close(None)


_PushCall = grpc.aio.StreamUnaryCall[transfer_pb2.TransferFrame, transfer_pb2.PushResult]


async def _explain(call: "_PushCall", error: Exception, address: str) -> str:
    """Why a push failed: the receiver's own words where it said some."""
    if isinstance(error, TimeoutError):
        return f"the decode server at {address} can't be reached, or takes nothing any more"
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return await call.details() or "the decode server ended the transfer"
