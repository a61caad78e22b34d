"""The decode side's gRPC service: brings frames to `InboundTransfers`, and its answers back."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from baton.core.errors import TransferRefused
from baton.rpc.first_message import first_message
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import num_payload_bytes
from baton_kv_transfer.transfers.inbound import Writer
from baton_kv_transfer.transfers.inbound_call import InboundCall
from baton_kv_transfer.transports.base import Intake, IntakeRequest, PushContext, ReceivingWorker
from baton_kv_transfer.transports.registry import ReceivingTransports

logger = logging.getLogger(__name__)

SERVICE = "baton.v1.Transfer"
# Reads of one transfer that may be under way; frames wait for them.
MAX_READS = 4


class TransferReceiver:
    """Serves baton.v1.Transfer. Checks and writes happen in one go on the event loop's thread."""

    def __init__(self, worker: ReceivingWorker, transports: ReceivingTransports) -> None:
        self._worker = worker
        self._transports = transports

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server. Not through the generated code, whose stubs copy payloads twice."""
        methods = self._transports.methods(self._worker)
        methods["Push"] = grpc.stream_unary_rpc_method_handler(
            self.push, response_serializer=transfer_pb2.PushResult.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def push(self, frames: AsyncIterator[bytes], context: PushContext) -> transfer_pb2.PushResult:
        """See transfer.proto."""
        push = _Push(self._worker, self._transports)
        try:
            return transfer_pb2.PushResult(bytes_received=await push.run(frames, context))
        except TransferRefused as error:
            self._worker.stats.outcomes[error.reason] += 1
            logger.info("transfer of %s refused (%s): %s", push.request_id, error.reason, error)
            raise


class _Push:
    """One Push call: its frames, and the reads that they ask for."""

    def __init__(self, worker: ReceivingWorker, transports: ReceivingTransports) -> None:
        self._worker = worker
        self._transports = transports
        self._call = InboundCall(worker.inbound)
        self._decided = asyncio.Event()
        self._intake: Intake | None = None  # once the first frame has named the transport
        self._reads: set[asyncio.Task[None]] = set()

    @property
    def request_id(self) -> str:
        """Whose pages these are, as far as is known."""
        writer = self._call.writer
        return "an unknown request" if writer is None else writer.transfer.reservation.request_id

    async def run(self, frames: AsyncIterator[bytes], context: PushContext) -> int:
        """Returns the KV bytes that have come. Raises TransferRefused where the transfer fails."""
        reading = asyncio.create_task(self._take_all(frames, context))
        deciding = asyncio.create_task(self._decided.wait())
        try:
            # Every state of a reservation has a deadline, so that one of the two comes to an end.
            await asyncio.wait((reading, deciding), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                await deciding
            return self._call.result()
        finally:
            tasks = (reading, deciding, *self._reads)
            for task in tasks:
                task.cancel()
            self._call.end(self._worker.clock())
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._intake is not None:
                self._intake.close()

    async def _take_all(self, frames: AsyncIterator[bytes], context: PushContext) -> None:
        """Take frames until the last one; sets `decided` when the transfer's end is known."""
        frames = aiter(frames)
        opening = await first_message(frames)
        if opening is not None:
            writer = await self._open(wire.decode(opening), context)
            while not self._call.is_complete and (more := await anext(frames, None)) is not None:
                await self._take(wire.decode(more), writer)
        self._call.no_more_frames()
        if self._call.is_decided:
            self._decided.set()

    async def _open(self, frame: wire.Frame, context: PushContext) -> Writer:
        """Take the first frame. Raises TransferRefused."""
        self._call.take(frame, self._worker.clock())
        writer = self._call.writer
        assert writer is not None
        self._call.when_decided(self._decided.set)
        request = IntakeRequest(frame.message.open, writer.layout, context, self._worker.stall_timeout_s)
        self._intake = self._transports.intake(writer.transport, request)
        await self._intake.prepare()
        return writer

    async def _take(self, frame: wire.Frame, writer: Writer) -> None:
        """Take one of the frames that follow. Raises TransferRefused."""
        await self._wait_for_turn(frame, writer)
        if self._call.take(frame, self._worker.clock()) is not None:
            await self._read(writer, frame.message.shipped)

    async def _wait_for_turn(self, frame: wire.Frame, writer: Writer) -> None:
        """Until the pages of a frame may be taken."""
        num_bytes = len(frame.payload)
        if frame.message.HasField("shipped"):
            place = wire.place_of(frame.message.shipped.pages)
            # Only said, and not checked yet: no read is longer, and others wait for what is counted here.
            num_bytes = min(num_payload_bytes(writer.layout, place), self._worker.inbound.longest_message)
        if num_bytes:
            await asyncio.sleep(self._worker.pace.delay_s(num_bytes, self._worker.clock()))
            await self._transports.writer.room()

    async def _read(self, writer: Writer, shipped: transfer_pb2.Shipped) -> None:
        """Begin to read pages out of the sender's pool."""
        if len(self._reads) == MAX_READS:
            await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._read_and_deliver(writer, shipped))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)

    async def _read_and_deliver(self, writer: Writer, shipped: transfer_pb2.Shipped) -> None:
        assert self._intake is not None
        try:
            landing = await self._intake.fetch(shipped)
            try:
                place = wire.place_of(shipped.pages)
                self._worker.inbound.deliver_checked(
                    writer, place, landing.memory, self._worker.clock(), landing.release
                )
            except BaseException:
                landing.release()
                raise
        except TransferRefused as error:
            self._worker.inbound.fail(writer, error)
        except Exception as error:  # a bug, which is not to leave the transfer waiting
            logger.exception("pages could not be read")
            self._worker.inbound.fail(writer, TransferRefused("internal", repr(error)))
