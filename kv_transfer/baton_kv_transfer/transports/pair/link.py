"""A prefill server's pair of process groups with one decode server: made in the background, made anew when it
breaks; meanwhile transfers go over gRPC."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from baton.core.errors import TransferRefused
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket
from baton.rpc.limits import CHANNEL_OPTIONS
from baton.v1 import transfer_pb2, transfer_pb2_grpc
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import PagesToSend, copy_into, frame_places, num_payload_bytes, views
from baton_kv_transfer.transports.base import Route
from baton_kv_transfer.transports.pair.pair_end import breaking
from baton_kv_transfer.transports.pair.process_group import sending_end
from baton_kv_transfer.transports.pair.sending_end import SendingEnd

logger = logging.getLogger(__name__)

MEETING_TIMEOUT_S = 10.0
# After a pair broke, or could not be made; doubled each time up to the second.
RETRY_DELAYS_S = (1.0, 30.0)

_PairCall = grpc.aio.StreamStreamCall[transfer_pb2.PairFrame, transfer_pb2.PairReply]


class Pair:
    """A pair that works: its sending end, and the call that announces what is sent."""

    def __init__(self, end: SendingEnd, call: _PairCall) -> None:
        self._end = end
        self._call = call
        # Bounded by the end's own queue: each announcement's pages are sent before the next but a few.
        self._announcements: asyncio.Queue[transfer_pb2.PairFrame] = asyncio.Queue()

    @property
    def max_bytes(self) -> int:
        """The longest message."""
        return self._end.max_bytes

    @property
    def is_whole(self) -> bool:
        """Whether messages can still be sent."""
        return self._end.is_whole

    async def send(self, ticket: Ticket, store: PageStore, place: FramePlace, blocks: Sequence[int]) -> None:
        """Send the pages of a place; returns when they have been read. Raises TransferRefused."""
        num_bytes = num_payload_bytes(store.layout, place)

        def fill(staging: Any) -> None:
            device = store.device_pages
            if device is None:
                copy_into(staging, views(store, blocks, place))
            elif isinstance(staging, memoryview):  # only one of the two servers has its pages on a device
                device.read(blocks, place.first_layer, place.num_layers, staging)
            else:
                device.gather(blocks, place.first_layer, place.num_layers, staging)

        def announce(checksum: int) -> None:
            header = transfer_pb2.PairPages(
                transfer_id=ticket.transfer_id,
                epoch=ticket.epoch,
                pages=wire.pages_message(place, checksum),
                num_bytes=num_bytes,
            )
            self._announcements.put_nowait(transfer_pb2.PairFrame(pages=header))

        await self._end.send(num_bytes, fill, announce)

    async def announce_all(self) -> None:
        """Write announcements, in order, until the call breaks."""
        while True:
            await self._call.write(await self._announcements.get())

    async def close(self) -> None:
        """Let go of the end and the call."""
        self._call.cancel()
        await self._end.close()


class PairLink:
    """Keeps a pair with one decode server, from the first time that somebody asks for it."""

    def __init__(
        self,
        address: str,
        metadata: tuple[tuple[str, str], ...],
        max_bytes: int,
        stall_timeout_s: float,
        checksum: Callable[[Any], int] | None,
    ) -> None:
        """`checksum`: of bytes on a device, for a pair between devices."""
        self._checksum = checksum
        self._address = address
        self._metadata = metadata
        self._device = ""  # of the buffers on either side
        self._max_bytes = max_bytes
        self._stall_timeout_s = stall_timeout_s
        self._pair: Pair | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_wanted = asyncio.Event()  # since it broke, or could not be made
        self._epoch = 0

    def pair(self, epoch: int, device: str) -> Pair | None:
        """The pair with the decode server of this epoch, with its buffers on `device`, "cpu" or "cuda".

        None while there is none, or only one that has broken and takes its time to close.
        """
        self._is_wanted.set()
        if epoch != self._epoch:
            self._epoch, self._device = epoch, device
            self._restart()
        return self._pair if self._pair is not None and self._pair.is_whole else None

    async def close(self) -> None:
        """End the pair and its task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _restart(self) -> None:
        """The decode server is another than it was: what there is of a pair is worth nothing."""
        before, self._pair = self._task, None
        self._task = asyncio.create_task(self._keep(before))

    async def _keep(self, before: asyncio.Task[None] | None) -> None:
        """Make a pair, wait until it breaks, and again for the next transfer: the server may be gone."""
        if before is not None:
            before.cancel()
            await asyncio.gather(before, return_exceptions=True)
        first_delay_s, longest_delay_s = RETRY_DELAYS_S
        delay_s = first_delay_s
        while True:
            await self._is_wanted.wait()
            try:
                await self._make_and_use()
            except (TransferRefused, grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
                logger.warning("no pair of process groups, pages go over gRPC meanwhile: %s", _words(error))
            self._is_wanted.clear()
            if self._pair is not None:  # it was whole, and has broken
                self._pair, delay_s = None, first_delay_s
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, longest_delay_s)

    async def _make_and_use(self) -> None:
        # A connection of its own, and a new one each time: no failure of an earlier one stays with it.
        async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            await self._make_and_use_on(channel)

    async def _make_and_use_on(self, channel: grpc.aio.Channel) -> None:
        call = transfer_pb2_grpc.TransferStub(channel).Pair(metadata=self._metadata)
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pair: Pair | None = None
        try:
            async with asyncio.timeout(MEETING_TIMEOUT_S):
                end = await self._meet(call, breaking(broken))
                pair = Pair(end, call)
                if not (await _reply(call)).HasField("ready"):
                    raise TransferRefused("pair", "the decode server did not make its end")
            self._pair = pair
            logger.info("pair of process groups made")
            await self._use(pair, call, broken)
        finally:
            call.cancel()
            if pair is not None:
                await pair.close()

    async def _meet(self, call: _PairCall, on_broken: Callable[[TransferRefused], None]) -> SendingEnd:
        hello = transfer_pb2.PairHello(device=self._device)
        await call.write(transfer_pb2.PairFrame(hello=hello))
        meeting = (await _reply(call)).meeting
        return await sending_end(
            meeting.host,
            meeting.port,
            self._device,
            on_broken,
            max_bytes=self._max_bytes,
            stall_timeout_s=self._stall_timeout_s,
            checksum=self._checksum,
        )

    async def _use(self, pair: Pair, call: _PairCall, broken: asyncio.Future[None]) -> None:
        """Announce what is sent, until the pair or its call breaks; raises how."""
        announcing = asyncio.create_task(pair.announce_all())
        ending = asyncio.create_task(_reply(call))  # nothing more is said but by the call's end
        try:
            await asyncio.wait((announcing, ending, broken), return_when=asyncio.FIRST_COMPLETED)
            for done in (broken, announcing, ending):
                if done.done():
                    done.result()
        finally:
            announcing.cancel()
            ending.cancel()
            broken.cancel()
            await asyncio.gather(announcing, ending, broken, return_exceptions=True)


class PairRoute(Route):
    """Pages in messages of a pair."""

    name = "nccl"
    failures = frozenset({"pair"})
    waits_for_open = True

    def __init__(self, ticket: Ticket, store: PageStore, pair: Pair, carrier: str) -> None:
        self.carrier = carrier
        self._ticket = ticket
        self._store = store
        self._pair = pair

    async def send(self, pages: PagesToSend) -> int:
        """See Route; counts messages."""
        places = list(frame_places(self._store.layout, pages.place, self._pair.max_bytes))
        for place in places:
            first = place.first_block - pages.place.first_block
            blocks = pages.blocks[first : first + place.num_blocks]
            await self._pair.send(self._ticket, self._store, place, blocks)
        return len(places)


async def _reply(call: _PairCall) -> transfer_pb2.PairReply:
    reply = await call.read()
    if reply is grpc.aio.EOF:
        raise TransferRefused("pair", await call.details() or "the decode server has ended the pair")
    assert isinstance(reply, transfer_pb2.PairReply)
    return reply


def _words(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or type(error).__name__
