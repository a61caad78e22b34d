"""The prefill side of one transfer in virtual time: what OutgoingTransfer and its routes do."""

from collections.abc import Generator
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING

from baton.core.commands import FailureReason
from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket
from baton.rpc import codec
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import PagesToSend, checksum, frame_places, num_payload_bytes, views
from baton_kv_transfer.transfers.outbound import OutboundTransfer
from tests.simulation.calls import PushCall
from tests.simulation.receiver import LOOP
from tests.simulation.schedule import HOPS, LONG_STALLS, STALLS, Fault

if TYPE_CHECKING:
    from tests.simulation.prefill_worker import VirtualPrefill
    from tests.simulation.world import World

CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 30.0


class Way(Enum):
    """How pages travel."""

    FRAMES = "grpc"  # on the transfer's call
    STREAMS = "two calls"
    SIDE = "side"  # beside the call, in messages of the sender's
    READ = "read"  # beside the call, read by the receiver


class Wait(Enum):
    """What a push waits for."""

    PAGES = "pages"
    WRITTEN = "written"
    OPENED = "opened"
    ANSWER = "answer"


# Yields what for, and how long it takes (WRITTEN) or may take (the others).
Waits = Generator[tuple[Wait, float], None, None]


class VirtualPush:
    """Implements baton_prefill_service.handover.Outgoing; its work yields what it waits for."""

    def __init__(self, world: "World", prefill: "VirtualPrefill", ticket: Ticket) -> None:
        layout = prefill.pages.layout
        layout.require_convertible_to(ticket.layout)
        self.name = f"push of {ticket.request_id}"
        self.first_block = _first_block(ticket, layout)
        self._world = world
        self._prefill = prefill
        self._ticket = ticket
        self._way = world.pick_way()
        self._outbound = OutboundTransfer(ticket, prefill.release)
        self._calls: list[PushCall] = []
        self._work = self._push()
        self._waits_for: Wait | None = None
        self._turn = 0  # of the work; what was to wake an earlier one is moot
        self._is_over = False
        self._is_cancelled = False
        self._paused_until = 0.0
        self._side_arrives = 0.0
        world.count["transfer by " + self._way.value] += 1
        if layout != ticket.layout:
            world.count["transfer between blocks of two sizes"] += 1
        world.after(LOOP, self._resume, 0)

    # --- Outgoing -------------------------------------------------------------------------------------

    def send_pages(self, place: FramePlace, blocks: tuple[int, ...]) -> None:
        """Queue pages that are final."""
        self._outbound.add_pages(PagesToSend(place, blocks))
        self._wake()

    def commit(self, first_tokens: list[int], finished_choices: list[int]) -> None:
        """The prompt is computed; all pages are queued."""
        self._outbound.commit(first_tokens, finished_choices)
        self._wake()

    def withdraw(self) -> None:
        """The first tokens ended the request."""
        self._world.count["withdraw"] += 1
        self._outbound.withdraw()
        self._wake()

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._is_cancelled = True
        self._world.after(LOOP, self._cancelled)

    # --- what befalls it ------------------------------------------------------------------------------

    def pause(self, seconds: float) -> None:
        """Do nothing for a while, holding everything."""
        self._paused_until = self._world.now + seconds

    def die(self, number: int) -> None:
        """Its server has gone."""
        self._is_over = True
        for call in self._calls:
            call.lose_sender(number)

    def opened(self, call: PushCall) -> None:
        """See calls.Sender."""
        if self._waits_for is Wait.OPENED:
            self._resume(self._turn)

    def answered(self, call: PushCall) -> None:
        """See calls.Sender."""
        if self._waits_for in (Wait.WRITTEN, Wait.OPENED) or (
            self._waits_for is Wait.ANSWER and call is self._calls[0]
        ):
            self._resume(self._turn)

    # --- the work -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._waits_for is Wait.PAGES:
            self._waits_for = None
            self._world.after(LOOP, self._resume, self._turn)

    def _resume(self, turn: int, is_late: bool = False) -> None:
        """Go on until the next wait, or to the end."""
        if turn != self._turn or self._is_over or self._is_cancelled:
            return
        world = self._world
        if world.now < self._paused_until:
            world.at(self._paused_until, self._resume, turn, is_late)
            return
        self._turn += 1
        try:
            self._waits_for, seconds = self._work.throw(_late()) if is_late else next(self._work)
        except StopIteration:
            self._end()
            self._prefill.handover.transfer_ended(self._ticket.request_id)
        except TransferRefused as error:
            self._end()
            message = f"The KV transfer failed: {error}."
            self._prefill.handover.transfer_failed(self._ticket.request_id, FailureReason.TRANSFER, message)
        else:
            if self._waits_for is not Wait.PAGES:
                world.after(seconds, self._resume, self._turn, self._waits_for is not Wait.WRITTEN)

    def _cancelled(self) -> None:
        if self._is_over:
            return
        if self._world.now < self._paused_until:
            self._world.at(self._paused_until, self._cancelled)
            return
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._prefill.pushes.remove(self)
        for call in self._calls:
            call.cancel()
        self._outbound.close()

    def _push(self) -> Waits:
        """OutgoingTransfer._push. Raises TransferRefused where the receiver refuses, stalls or goes away."""
        self._calls = [
            PushCall(self._world, self, f"{self.name}, call {stream}")
            for stream in range(2 if self._way is Way.STREAMS else 1)
        ]
        for stream, call in enumerate(self._calls):
            yield from self._write(call, self._opening(stream), "open", CONNECT_TIMEOUT_S)
            if self._way is Way.SIDE:
                while not call.has_opened:
                    self._require_alive(call)
                    yield Wait.OPENED, CONNECT_TIMEOUT_S
        while isinstance(item := (yield from self._next()), PagesToSend):
            yield from self._send(item)
            if self._way is not Way.READ:
                self._outbound.done_with(item.blocks)
        for call in self._calls[1:]:
            call.half_close()
        first = self._calls[0]
        kind = "commit" if item.HasField("commit") else "withdraw"
        yield from self._write(first, item.SerializeToString(), kind, STALL_TIMEOUT_S)
        first.half_close()
        while first.answer is None:
            yield Wait.ANSWER, STALL_TIMEOUT_S
        self._require_alive(first, is_end=True)

    def _next(self) -> Generator[tuple[Wait, float], None, PagesToSend | transfer_pb2.TransferFrame]:
        while (item := self._outbound.next()) is None:
            yield Wait.PAGES, 0.0
        return item

    def _send(self, pages: PagesToSend) -> Waits:
        """Route.send."""
        store, ticket = self._prefill.pages, self._ticket
        for index, place in enumerate(frame_places(store.layout, pages.place, self._world.frame_bytes)):
            first = place.first_block - pages.place.first_block
            blocks = pages.blocks[first : first + place.num_blocks]
            parts = views(store, blocks, place)
            head = wire.pages_message(place, checksum(parts))
            num_bytes = num_payload_bytes(store.layout, place)
            match self._way:
                case Way.SIDE:
                    yield from self._send_beside(place, b"".join(parts), head.crc32c)
                case Way.READ:
                    message = self._outbound.frame()
                    message.shipped.pages.CopyFrom(head)
                    message.shipped.source_blocks.extend(blocks)
                    frame = message.SerializeToString()
                    yield from self._write(self._calls[0], frame, "shipped", STALL_TIMEOUT_S)
                case _:
                    frame = wire.encode_pages(ticket.transfer_id, ticket.epoch, head, parts, num_bytes)
                    call = self._calls[index % len(self._calls)]
                    yield from self._write(call, frame, "pages", STALL_TIMEOUT_S, num_bytes)

    def _write(
        self, call: PushCall, frame: bytes, kind: str, timeout: float, payload_bytes: int = 0
    ) -> Waits:
        self._require_alive(call)
        seconds = call.write(frame, kind, payload_bytes)
        if seconds > timeout:
            yield Wait.WRITTEN, timeout
            self._require_alive(call)
            raise _late()
        if seconds:
            yield Wait.WRITTEN, seconds
            self._require_alive(call)

    def _send_beside(self, place: FramePlace, payload: bytes, crc: int) -> Waits:
        """A message of the side path: in order where nothing goes wrong, but not with the call's frames."""
        world, ticket = self._world, self._ticket
        self._require_alive(self._calls[0])
        byte = world.schedule.byte()
        fault, delay, is_corrupted, times = world.faults[byte >> 3], HOPS[byte & 7], False, 1
        match fault:
            case Fault.LOST:
                times = 0
            case Fault.DUPLICATED | Fault.ECHOED:
                times = 2
            case Fault.STALLED:
                delay = STALLS[byte & 3]
            case Fault.HELD_UP:
                delay = LONG_STALLS[byte & 3]
            case Fault.CORRUPTED:
                changed = bytearray(payload)
                changed[world.schedule.byte() * len(payload) // 256] ^= 1 << (byte & 7)
                payload, is_corrupted = bytes(changed), True
        if fault is not None:
            world.fault(fault, self.name, "side")
        if fault is not Fault.OVERTAKEN:
            self._side_arrives = max(self._side_arrives, world.now + delay)
        arrives = world.now + delay + 0.01 if fault is Fault.OVERTAKEN else self._side_arrives
        for index in range(times):
            world.at(
                arrives + 0.5 * index,
                world.arrive_beside,
                (ticket.transfer_id, ticket.epoch, place, memoryview(payload), crc),
                is_corrupted,
            )
        yield Wait.WRITTEN, 0.0002

    def _require_alive(self, call: PushCall, *, is_end: bool = False) -> None:
        """Raises TransferRefused where the call is over too early, or badly."""
        if call.answer is not None and not (is_end and call.answer):
            raise TransferRefused("push", "the decode server ended the transfer")

    def _opening(self, stream: int) -> bytes:
        # What protobuf writes field by field may as well be put together so.
        return self._outbound.frame().SerializeToString() + _open(
            self._prefill.pages.layout, self._way, stream
        )


def _late() -> TransferRefused:
    return TransferRefused("push", "the decode server takes nothing any more")


def _first_block(ticket: Ticket, layout: KVLayout) -> int:
    """Of the prompt, in the sender's blocks, that decode misses (OutgoingTransfer.first_block)."""
    if ticket.first_token >= ticket.num_tokens:
        return layout.blocks_for(ticket.num_tokens)
    return ticket.first_token // layout.block_size


@cache
def _open(layout: KVLayout, way: Way, stream: int) -> bytes:
    opening = transfer_pb2.Open(
        layout=codec.layout_to_proto(layout),
        protocol_version=codec.PROTOCOL_VERSION,
        transport="grpc" if way is Way.STREAMS else way.value,
        stream=stream,
        num_streams=2 if way is Way.STREAMS else 0,
    )
    return transfer_pb2.TransferFrame(open=opening).SerializeToString()
