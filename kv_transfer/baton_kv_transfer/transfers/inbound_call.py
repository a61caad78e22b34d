"""One Push call on the decode side, frame by frame. Pure: no I/O, no clock."""

from collections.abc import Callable

from baton.core.errors import TransferRefused
from baton.core.reservation import TransferState
from baton_kv_transfer.pages.wire import Frame
from baton_kv_transfer.transfers.inbound import CallEnd, InboundTransfers, Writer


class InboundCall:
    """Takes the call's frames in order; `end` must be called exactly once, however the call ends."""

    def __init__(self, transfers: InboundTransfers) -> None:
        self._transfers = transfers
        self._end = CallEnd.BROKEN
        self._is_first_stream = True
        self._may_wait = False  # pages may come by another way than this call
        self.writer: Writer | None = None
        self.is_complete = False  # the sender has nothing more to say on this call

    def take(self, frame: Frame, now: float) -> Frame | None:
        """Handle one frame; returns it where its pages have to be fetched. Raises TransferRefused."""
        kind = frame.message.WhichOneof("body")
        if kind == "open":
            self._open(frame, now)
            return None
        writer = self._same(frame)
        match kind:
            case "pages":
                self._transfers.deliver(frame, writer, now)
            case "shipped":
                return frame
            case "commit":
                self.is_complete = True
                self._transfers.commit(frame, writer, now, may_wait=self._may_wait)
                self._end = CallEnd.COMPLETE
            case "withdraw":
                if frame.message.withdraw.ByteSize():  # pages are one bit away from it
                    raise TransferRefused("frame", "a withdrawal that says more than that")
                self.is_complete = True
                self._end = CallEnd.WITHDRAWN
            case _:
                raise TransferRefused("frame", "a frame of a kind that this server does not know")
        return None

    def no_more_frames(self) -> None:
        """The sender has said its last word. Raises TransferRefused where something is missing."""
        if not self._is_first_stream:
            self.is_complete = True
            self._end = CallEnd.COMPLETE
        if not self.is_complete:
            raise TransferRefused("incomplete", "the transfer ended without commit")

    @property
    def is_decided(self) -> bool:
        """Whether the answer is known: committed, withdrawn or failed."""
        if self.writer is None:
            return False
        transfer = self.writer.transfer
        return (
            transfer.error is not None
            or transfer.reservation.state is TransferState.COMMITTED
            or (self.is_complete and (self._end is CallEnd.WITHDRAWN or not self._is_first_stream))
        )

    def when_decided(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the transfer is committed or has failed."""
        if self.writer is not None:
            self.writer.transfer.on_over.append(callback)

    def result(self) -> int:
        """KV bytes that have come. Raises TransferRefused where the transfer has failed."""
        if self.writer is None:
            raise TransferRefused("incomplete", "the call ended before it began")
        if self.writer.transfer.error is not None:
            raise self.writer.transfer.error
        return self.writer.transfer.num_bytes

    def end(self, now: float) -> None:
        """Nothing comes over this call any more."""
        if self.writer is not None:
            self._transfers.call_ended(self.writer, now, self._end)

    def _open(self, frame: Frame, now: float) -> None:
        if self.writer is not None:
            raise TransferRefused("state", "a call carries one transfer")
        opening = frame.message.open
        self._is_first_stream = opening.stream == 0
        self._may_wait = opening.num_streams > 1 or opening.transport not in ("", "grpc")
        self.writer = self._transfers.open(frame, now)

    def _same(self, frame: Frame) -> Writer:
        """No frame may speak of another reservation than the one that this call opened."""
        if self.writer is None:
            raise TransferRefused("ticket", "a frame before the one that opens the transfer")
        self._transfers.require_same(frame, self.writer)
        return self.writer
