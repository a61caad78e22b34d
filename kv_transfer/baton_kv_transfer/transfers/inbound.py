"""The decode side of transfers, without their transport: every check stands here, before a byte of a frame
touches a page.

Pure: no I/O, no clock. All of it runs on one thread, so that no write of host memory is ever under way when
an abort is handled; transports that bring bytes on another thread land them in memory of their own first.
Writes of a device's memory take a while: an abort waits for them (see Reservation.written).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.reservation import Extent, FramePlace, Reservation, ReservationTable, TransferState
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton_kv_transfer.pages.arrived import Arrived, HostWriter, PageWriter
from baton_kv_transfer.pages.convert import PageConverter
from baton_kv_transfer.pages.frames import check, longest_message
from baton_kv_transfer.pages.wire import Frame, check_seal, place_of


class TransferOwner(Protocol):
    """What the decode service does as transfers go on."""

    def deadline_changed(self, reservation: Reservation) -> None:
        """A writer has taken the pages, or its commit has come before its pages: there is a new deadline."""
        ...

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """All pages are there; `first_tokens` of the choices that go on, by choice."""
        ...

    def withdrawn(self, reservation: Reservation) -> None:
        """Prefill's first tokens ended the request."""
        ...

    def writer_gone(self, reservation: Reservation) -> None:
        """A writer has let go, and the reservation may be over."""
        ...


class CallEnd(Enum):
    """How a call of a writer ended."""

    COMPLETE = "complete"  # it has brought what it was to bring
    BROKEN = "broken"
    WITHDRAWN = "withdrawn"  # the request has ended on prefill


class InboundTransfer:
    """One reservation that has writers."""

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        self.first_tokens: dict[int, int] = {}
        self.error: TransferRefused | None = None  # why it ended early
        self.num_bytes = 0
        self.is_withdrawn = False
        self.on_over: list[Callable[[], None]] = []  # called once, when it is committed or has failed

    def announce(self) -> None:
        """It is committed or has failed: wake whoever waits for that."""
        callbacks, self.on_over = self.on_over, []
        for callback in callbacks:
            callback()


@dataclass(frozen=True, slots=True)
class Writer:
    """One sender's part in a transfer: its layout, and how its pages become ours."""

    transfer: InboundTransfer
    index: int  # among the reservation's writers
    converter: PageConverter
    layout: KVLayout
    transport: str
    streams: set[int]  # its calls, by number


class InboundTransfers:
    """All transfers into one decode server's pages."""

    def __init__(
        self,
        table: ReservationTable,
        store: PageStore,
        owner: TransferOwner,
        stats: TransferStats,
        pages: PageWriter | None = None,
    ) -> None:
        """`pages` writes the store's pages; None: they are host memory."""
        self._table = table
        self._store = store
        self._pages = HostWriter(store) if pages is None else pages
        self._owner = owner
        self._stats = stats
        self._open: dict[bytes, InboundTransfer] = {}
        self._writers: dict[bytes, list[Writer]] = {}

    @property
    def longest_message(self) -> int:
        """Bytes of the longest message or read that brings pages."""
        return longest_message(self._store.layout)

    # --- calls --------------------------------------------------------------------------------------

    def open(self, frame: Frame, now: float) -> Writer:
        """A writer's first frame. Raises TransferRefused."""
        message = frame.message
        version = message.open.protocol_version
        if version != codec.PROTOCOL_VERSION:
            words = f"transfer of protocol version {version}; this server speaks {codec.PROTOCOL_VERSION}"
            raise TransferRefused("version", words)
        layout = codec.layout_from_proto(message.open.layout)
        converter = PageConverter(layout, self._store.layout)
        reservation = self._table.find(message.transfer_id, message.epoch)
        stream = message.open.stream
        for writer in self._writers.get(reservation.transfer_id, ()):
            # Calls of one writer may come in any order.
            if writer.converter.heads == converter.heads and stream not in writer.streams:
                reservation.attach(now)
                writer.streams.add(stream)
                return writer
        blocks = converter.source_blocks(*self._tokens_of(reservation))
        extent = Extent(blocks.start, blocks.stop, layout.num_layers, converter.heads)
        index = reservation.open(extent, now)
        transfer = self._open.setdefault(reservation.transfer_id, InboundTransfer(reservation))
        transport = message.open.transport or "grpc"
        writer = Writer(transfer, index, converter, layout, transport, {stream})
        self._writers.setdefault(reservation.transfer_id, []).append(writer)
        self._owner.deadline_changed(reservation)
        reservation.settle()  # it may have had nothing left to bring
        self._finish_if_committed(transfer)
        return writer

    def require_same(self, frame: Frame, writer: Writer) -> None:
        """Raises TransferRefused unless the frame speaks of the writer's own reservation."""
        reservation = writer.transfer.reservation
        if self._table.find(frame.message.transfer_id, frame.message.epoch) is not reservation:
            raise TransferRefused("ticket", "the frame's ticket is not the one that this call opened")

    def commit(self, frame: Frame, writer: Writer, now: float, *, may_wait: bool) -> None:
        """The writer's last frame. Raises TransferRefused."""
        check_seal(frame.message.commit, writer.layout.scales)
        finished = set(frame.message.commit.finished_choices)
        first_tokens = {
            choice: token
            for choice, token in enumerate(frame.message.commit.first_tokens)
            if choice not in finished
        }
        if not first_tokens:
            raise TransferRefused("incomplete", "commit without a choice that goes on")
        writer.transfer.first_tokens = first_tokens
        reservation = writer.transfer.reservation
        reservation.commit(now, may_wait=may_wait)
        self._finish_if_committed(writer.transfer)
        if not reservation.is_over:
            self._owner.deadline_changed(reservation)

    def call_ended(self, writer: Writer, now: float, end: CallEnd) -> None:
        """One of the writer's calls has ended; nothing comes over it any more."""
        transfer = writer.transfer
        if not transfer.reservation.is_over:
            transfer.is_withdrawn = transfer.is_withdrawn or end is CallEnd.WITHDRAWN
            transfer.reservation.call_ended(now, is_complete=end is CallEnd.COMPLETE)
            self._let_go(transfer)
        if transfer.is_withdrawn:
            transfer.announce()  # its other calls end as well, and nothing has failed
        elif end is not CallEnd.COMPLETE:
            self._decide(transfer, TransferRefused("incomplete", "the transfer ended without commit"))
        if transfer.reservation.is_over:
            self._forget(transfer)

    def aborted(self, reservation: Reservation) -> None:
        """Its request is not wanted any more, or it has missed a deadline: let its writers know."""
        transfer = self._open.get(reservation.transfer_id)
        if transfer is not None:
            message = f"transfer of {reservation.request_id} is {reservation.state.value}"
            self._decide(transfer, TransferRefused("state", message))
            if reservation.is_over:  # there may be no call left whose end would see to it
                self._forget(transfer)

    # --- pages --------------------------------------------------------------------------------------

    def writer_of(self, transfer_id: bytes, epoch: int, layout_index: int = 0) -> Writer:
        """The writer that pages on a path beside its call belong to. Raises TransferRefused."""
        reservation = self._table.find(transfer_id, epoch)
        writers = self._writers.get(reservation.transfer_id, [])
        if layout_index >= len(writers):
            raise TransferRefused("state", f"pages for {reservation.request_id}, which nobody has opened")
        return writers[layout_index]

    def deliver_checked(
        self,
        writer: Writer,
        place: FramePlace,
        payload: Any,
        now: float,
        when_read: Callable[[], None] | None = None,
    ) -> None:
        """Write pages whose length and checksum are right, from host memory or a buffer of DevicePages.

        `when_read` is called once the payload is not read any more. Raises TransferRefused, having written
        nothing and called nothing.
        """
        reservation = writer.transfer.reservation
        reservation.accept(writer.index, place, now)
        writer.transfer.num_bytes += len(payload)
        transport = self._stats.transports[writer.transport]
        transport.num_bytes += len(payload)
        transport.num_operations += 1
        arrived = Arrived(
            writer.converter, reservation.block_table, *self._tokens_of(reservation), place, payload
        )
        self._pages.write(arrived, partial(self._written, writer.transfer, now, when_read))

    def _written(
        self,
        transfer: InboundTransfer,
        now: float,
        when_read: Callable[[], None] | None,
        error: BaseException | None,
    ) -> None:
        """Pages that came at `now` are in their places, or can't be brought there."""
        if when_read is not None:
            when_read()
        reservation = transfer.reservation
        if error is not None:
            reservation.abort(now)
            self._decide(transfer, TransferRefused("internal", f"pages could not be written: {error!r}"))
        reservation.written()
        self._finish_if_committed(transfer)
        if reservation.state is TransferState.DRAINED:
            self._let_go(transfer)
            self._forget(transfer)

    def deliver(self, frame: Frame, writer: Writer, now: float) -> None:
        """Check and write the pages of a frame. Raises TransferRefused, having written nothing."""
        place = place_of(frame.message.pages)
        check(frame.payload, frame.message.pages.crc32c, place, writer.layout)
        self.deliver_checked(writer, place, frame.payload, now)

    def fail(self, writer: Writer, error: TransferRefused) -> None:
        """Pages on a path beside the writer's call did not come, or came wrong."""
        self._decide(writer.transfer, error)

    # --- ends ---------------------------------------------------------------------------------------

    def _let_go(self, transfer: InboundTransfer) -> None:
        """A writer's call has ended, or its last write."""
        if transfer.is_withdrawn:
            self._owner.withdrawn(transfer.reservation)
        else:
            self._owner.writer_gone(transfer.reservation)

    def _finish_if_committed(self, transfer: InboundTransfer) -> None:
        reservation = transfer.reservation
        if reservation.state is TransferState.COMMITTED:
            self._table.remove(reservation)
            self._forget(transfer)
            self._stats.outcomes["committed"] += 1
            self._owner.committed(reservation.request_id, transfer.first_tokens)
            transfer.announce()

    def _decide(self, transfer: InboundTransfer, error: TransferRefused) -> None:
        if transfer.error is None and transfer.reservation.state is not TransferState.COMMITTED:
            transfer.error = error
            transfer.announce()

    def _forget(self, transfer: InboundTransfer) -> None:
        self._open.pop(transfer.reservation.transfer_id, None)
        self._writers.pop(transfer.reservation.transfer_id, None)

    def _tokens_of(self, reservation: Reservation) -> tuple[int, int]:
        """First token that travels, and where the prompt ends."""
        block_size = self._store.layout.block_size
        return reservation.first_block * block_size, reservation.num_tokens
