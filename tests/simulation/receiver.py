"""The decode side of Push calls in virtual time: what TransferReceiver does."""

from typing import TYPE_CHECKING

from baton.core.errors import TransferRefused
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.wire import Frame, place_of
from baton_kv_transfer.transfers.inbound import Writer
from baton_kv_transfer.transfers.inbound_call import InboundCall
from tests.simulation.pages import NUM_LAYERS
from tests.simulation.schedule import Fault

if TYPE_CHECKING:
    from tests.simulation.calls import PushCall
    from tests.simulation.decode_worker import VirtualDecode
    from tests.simulation.world import World

LOOP = 0.00005  # until a task runs that was woken


class ServerCall:
    """One call as the receiver sees it: reading until its last frame, then waiting for the transfer's end."""

    def __init__(self, world: "World", decode: "VirtualDecode", client: "PushCall", name: str) -> None:
        self.name = name
        self._world = world
        self._decode = decode
        self._client = client
        self._call = InboundCall(decode.handover.inbound)
        self._is_reading = True
        self._is_finishing = False
        self._is_over = False
        self._error: TransferRefused | None = None

    def take(self, frame: bytes, is_corrupted: bool) -> None:
        """A frame has come."""
        if not self._is_reading or self._is_over or self._decode.is_dead:
            return
        call = self._call
        is_new = call.writer is None
        try:
            to_read = self._deliver(frame)
        except TransferRefused as error:
            self._world.count["refused: " + error.reason] += 1
            self._world.log(f"decode: {self.name} is refused ({error.reason}): {error}")
            self._refuse(error)
            return
        assert call.writer is not None
        if is_corrupted:
            self._decode.taint(call.writer)
        if is_new:
            self._decode.attached(call.writer, self)
            call.when_decided(self._finish_soon)
            if call.writer.transport == "side":
                self._client.send_opened()
        if to_read is not None:
            self._world.after(self._world.hop(), self._read, to_read, call.writer)
        if call.is_complete:
            self._end_reading()

    def half_closed(self) -> None:
        """No frame comes any more."""
        if self._is_reading and not self._is_over and not self._decode.is_dead:
            self._end_reading()

    def broken(self) -> None:
        """The sender has gone."""
        if not self._is_over and not self._decode.is_dead:
            self._world.log(f"decode: {self.name} is cut")
            self._end()

    def _deliver(self, frame: bytes) -> Frame | None:
        call, decode = self._call, self._decode
        message = wire.decode(frame)
        if call.writer is not None:
            decode.pages.at_work = call.writer.transfer.reservation
        try:
            to_read = call.take(message, self._world.now)
        finally:
            decode.pages.at_work = None
        assert call.writer is not None  # the first frame opens, or is refused
        decode.taken(call.writer, message.message.transfer_id, message.message.epoch)
        return to_read

    def _end_reading(self) -> None:
        self._is_reading = False
        try:
            self._call.no_more_frames()
        except TransferRefused as error:
            self._refuse(error)
            return
        if self._call.is_decided:
            self._finish_soon()

    def _refuse(self, error: TransferRefused) -> None:
        self._is_reading = False
        self._error = error
        self._finish_soon()

    def _finish_soon(self) -> None:
        """The transfer's end is known; the call's comes when its task runs."""
        if not self._is_finishing:
            self._is_finishing = True
            self._world.after(self._world.receiver_lag or LOOP, self._finish)

    def _finish(self) -> None:
        if self._is_over or self._decode.is_dead:
            return
        is_ok = True
        try:
            if self._error is not None:
                raise self._error
            self._call.result()
        except TransferRefused as error:
            self._decode.stats.outcomes[error.reason] += 1
            is_ok = False
        self._world.log(f"decode: {self.name} ends {'well' if is_ok else 'badly'}")
        self._end()
        self._client.send_answer(is_ok)

    def _end(self) -> None:
        self._is_over = True
        if self._call.writer is not None:
            self._decode.detached(self._call.writer, self)
        self._call.end(self._world.now)

    # --- pages that the receiver reads out of the sender's memory -------------------------------------

    def _read(self, frame: Frame, writer: Writer) -> None:
        if self._is_over or self._decode.is_dead:
            return  # the read is cancelled with its call
        world = self._world
        shipped = frame.message.shipped
        payload, is_corrupted = self._read_memory(frame), False
        fault = world.faults[world.schedule.byte() >> 3]
        if fault is Fault.CORRUPTED and payload:
            world.fault(fault, self.name, "read")
            payload[world.schedule.byte() * len(payload) // 256] ^= 1
            is_corrupted = True
        message = frame.message
        checked = (
            message.transfer_id,
            message.epoch,
            place_of(shipped.pages),
            memoryview(payload),
            shipped.pages.crc32c,
        )
        self._decode.deliver_beside(writer, checked, is_corrupted)

    def _read_memory(self, frame: Frame) -> bytearray:
        """Whatever is in the sender's memory now."""
        pages, place, payload = self._world.prefill.pages, place_of(frame.message.shipped.pages), bytearray()
        for block in frame.message.shipped.source_blocks:
            if block < pages.num_blocks and place.first_layer + place.num_layers <= NUM_LAYERS:
                payload += pages.raw_page(block, place.first_layer, place.num_layers)
        return payload
