"""The decode side of a transfer over gRPC: every frame is checked before a byte of it touches a page."""

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from baton.core.errors import TransferRefused
from baton.core.ports import PageStore
from baton.core.reservation import Reservation, ReservationTable
from baton.rpc import codec
from baton.v1 import transfer_pb2, transfer_pb2_grpc
from kv_transfer.frames import check, unpack
from kv_transfer.stats import TransferStats


class TransferOwner(Protocol):
    """What the decode service does when a transfer begins and ends."""

    def opened(self, reservation: Reservation) -> None:
        """A writer has taken the pages: the reservation has a new deadline."""
        ...

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """All pages are there; `first_tokens` of the choices that go on, by choice."""
        ...

    def withdrawn(self, reservation: Reservation) -> None:
        """Prefill's first tokens ended the request."""
        ...

    def writer_gone(self, reservation: Reservation) -> None:
        """The call ended without commit: nothing is written any more."""
        ...


class GrpcReceiver(transfer_pb2_grpc.TransferServicer):
    """Serves Push. Checks and writes happen in one go on the event loop's thread, so that no write is
    ever under way when an abort is handled there."""

    def __init__(
        self,
        table: ReservationTable,
        store: PageStore,
        owner: TransferOwner,
        clock: Callable[[], float],
        stats: TransferStats,
    ) -> None:
        self._table = table
        self._store = store
        self._owner = owner
        self._clock = clock
        self._stats = stats

    async def Push(  # noqa: N802 - the name is the proto's
        self,
        request_iterator: AsyncIterator[transfer_pb2.TransferFrame],
        context: grpc.aio.ServicerContext[transfer_pb2.TransferFrame, transfer_pb2.PushResult],
    ) -> transfer_pb2.PushResult:
        """See transfer.proto."""
        reservation: Reservation | None = None
        num_bytes = 0
        try:
            async for frame in request_iterator:
                match frame.WhichOneof("body"):
                    case "open":
                        reservation = self._open(frame, reservation)
                    case "pages":
                        num_bytes += self._write(frame, reservation)
                    case "commit":
                        self._commit(frame, reservation)
                        return transfer_pb2.PushResult(bytes_received=num_bytes)
                    case "withdraw":
                        self._owner.withdrawn(self._same(frame, reservation))
                        return transfer_pb2.PushResult(bytes_received=num_bytes)
                    case _:
                        raise TransferRefused("frame", "a frame of a kind that this server does not know")
            raise TransferRefused("incomplete", "the transfer ended without commit")
        except TransferRefused as error:
            self._stats.outcomes[error.reason] += 1
            raise
        finally:
            if reservation is not None and not reservation.is_over:
                self._owner.writer_gone(reservation)

    def _open(self, frame: transfer_pb2.TransferFrame, opened: Reservation | None) -> Reservation:
        if opened is not None:
            raise TransferRefused("state", "a call carries one transfer")
        self._store.layout.require_same(codec.layout_from_proto(frame.open.layout))
        reservation = self._table.find(frame.transfer_id, frame.epoch)
        reservation.open(self._clock())
        self._owner.opened(reservation)
        return reservation

    def _same(self, frame: transfer_pb2.TransferFrame, opened: Reservation | None) -> Reservation:
        """The reservation that this call opened; no frame may speak of another one."""
        if opened is None or self._table.find(frame.transfer_id, frame.epoch) is not opened:
            raise TransferRefused("ticket", "the frame's ticket is not the one that this call opened")
        return opened

    def _write(self, frame: transfer_pb2.TransferFrame, opened: Reservation | None) -> int:
        reservation, pages = self._same(frame, opened), frame.pages
        payload = check(pages, self._store.layout)
        blocks = reservation.accept(
            pages.first_block, pages.num_blocks, pages.first_layer, pages.num_layers, self._clock()
        )
        unpack(self._store, blocks, pages, payload)
        self._stats.num_bytes += len(payload)
        return len(payload)

    def _commit(self, frame: transfer_pb2.TransferFrame, opened: Reservation | None) -> None:
        reservation = self._same(frame, opened)
        finished = set(frame.commit.finished_choices)
        first_tokens = {
            choice: token for choice, token in enumerate(frame.commit.first_tokens) if choice not in finished
        }
        if not first_tokens:
            raise TransferRefused("incomplete", "commit without a choice that goes on")
        reservation.commit()
        self._table.remove(reservation)
        self._stats.outcomes["committed"] += 1
        self._owner.committed(reservation.request_id, first_tokens)
