"""The decode side's gRPC service: brings frames to `InboundTransfers`, and its answers back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from baton.core.errors import TransferRefused
from baton.core.transfer_stats import TransferStats
from baton.rpc.first_message import first_message
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import num_payload_bytes
from baton_kv_transfer.transfers.inbound import InboundTransfers, Writer
from baton_kv_transfer.transfers.inbound_call import InboundCall
from baton_kv_transfer.transfers.pace import InboundPace
from baton_kv_transfer.transports.cuda_ipc import IpcReader
from baton_kv_transfer.transports.nixl.messages import read_shipped, remote_memory
from baton_kv_transfer.transports.nixl.reader import Landing, NixlReader
from baton_kv_transfer.transports.registry import ReceivingTransports

logger = logging.getLogger(__name__)

SERVICE = "baton.v1.Transfer"
# Reads of one transfer that may be under way; frames wait for them.
MAX_READS = 4

_PushContext = grpc.aio.ServicerContext[bytes, transfer_pb2.PushResult]
_PairContext = grpc.aio.ServicerContext[transfer_pb2.PairFrame, transfer_pb2.PairReply]


class TransferReceiver:
    """Serves baton.v1.Transfer. Checks and writes happen in one go on the event loop's thread."""

    def __init__(
        self,
        inbound: InboundTransfers,
        clock: Callable[[], float],
        stats: TransferStats,
        transports: ReceivingTransports,
        pace: InboundPace,
        *,
        host: str,
        stall_timeout_s: float,
    ) -> None:
        self._inbound = inbound
        self._clock = clock
        self._stats = stats
        self._transports = transports
        self._pace = pace
        self._host = host  # an address of this machine, that prefill servers reach
        self._stall_timeout_s = stall_timeout_s  # a prefill server whose pages stop for so long is given up

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server. Not through the generated code, whose stubs copy payloads twice."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Push": grpc.stream_unary_rpc_method_handler(
                self.push, response_serializer=transfer_pb2.PushResult.SerializeToString
            ),
            "Pair": grpc.stream_stream_rpc_method_handler(
                self.pair,
                request_deserializer=transfer_pb2.PairFrame.FromString,
                response_serializer=transfer_pb2.PairReply.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def push(self, frames: AsyncIterator[bytes], context: _PushContext) -> transfer_pb2.PushResult:
        """See transfer.proto."""
        push = _Push(self._inbound, self._clock, self._transports, self._pace, self._stall_timeout_s)
        try:
            return transfer_pb2.PushResult(bytes_received=await push.run(frames, context))
        except TransferRefused as error:
            self._stats.outcomes[error.reason] += 1
            logger.info("transfer refused (%s): %s", error.reason, error)
            raise

    async def pair(self, frames: AsyncIterator[transfer_pb2.PairFrame], context: _PairContext) -> None:
        """See transfer.proto."""
        if "nccl" not in self._transports.offer.names:
            raise TransferRefused("pair", "this server makes no pairs of process groups")
        from baton_kv_transfer.transports.pair.receiver import PairReceiver  # imports torch

        receiver = PairReceiver(
            self._inbound,
            self._clock,
            self._stats,
            self._host,
            self._inbound.longest_message,
            self._pace,
            self._stall_timeout_s,
            self._transports.checksum,
        )
        await receiver.pair(frames, context)


class _Push:
    """One Push call: its frames, and the reads that they ask for."""

    def __init__(
        self,
        inbound: InboundTransfers,
        clock: Callable[[], float],
        transports: ReceivingTransports,
        pace: InboundPace,
        stall_timeout_s: float,
    ) -> None:
        self._inbound = inbound
        self._clock = clock
        self._transports = transports
        self._pace = pace
        self._stall_timeout_s = stall_timeout_s
        self._call = InboundCall(inbound)
        self._decided = asyncio.Event()
        self._opening = transfer_pb2.Open()
        self._has_connected = False  # to the sender's pool, by CUDA IPC
        self._reads: set[asyncio.Task[None]] = set()

    async def run(self, frames: AsyncIterator[bytes], context: _PushContext) -> int:
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
            self._call.end(self._clock())
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._has_connected:
                self._ipc_reader.disconnect(self._opening.cuda_ipc)

    async def _take_all(self, frames: AsyncIterator[bytes], context: _PushContext) -> None:
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

    async def _open(self, frame: wire.Frame, context: _PushContext) -> Writer:
        """Take the first frame. Raises TransferRefused."""
        self._call.take(frame, self._clock())
        assert self._call.writer is not None
        self._call.when_decided(self._decided.set)
        self._opening = frame.message.open
        await self._prepare(self._call.writer, context)
        return self._call.writer

    async def _take(self, frame: wire.Frame, writer: Writer) -> None:
        """Take one of the frames that follow. Raises TransferRefused."""
        await self._wait_for_turn(frame, writer)
        if self._call.take(frame, self._clock()) is not None:
            await self._read(writer, frame.message.shipped)

    async def _wait_for_turn(self, frame: wire.Frame, writer: Writer) -> None:
        """Until the pages of a frame may be taken."""
        num_bytes = len(frame.payload)
        if frame.message.HasField("shipped"):
            place = wire.place_of(frame.message.shipped.pages)
            # Only said, and not checked yet: no read is longer, and others wait for what is counted here.
            num_bytes = min(num_payload_bytes(writer.layout, place), self._inbound.longest_message)
        if num_bytes:
            await asyncio.sleep(self._pace.delay_s(num_bytes, self._clock()))
            await self._transports.writer.room()

    async def _prepare(self, writer: Writer, context: _PushContext) -> None:
        """What a transport needs before pages come."""
        if writer.transport == "nccl":
            await context.send_initial_metadata(())  # pages may come now
        elif writer.transport == "nixl":
            remote = remote_memory(self._opening.nixl, writer.layout)
            await self._reader.connect(remote, self._stall_timeout_s)  # else the first read would wait for it
        elif writer.transport == "cuda_ipc":
            await self._ipc_reader.connect(self._opening.cuda_ipc, writer.layout)
            self._has_connected = True
        elif writer.transport != "grpc":  # its bytes would be counted under that name for ever
            raise TransferRefused("transport", "a transport that this server does not know")

    @property
    def _ipc_reader(self) -> IpcReader:
        if self._transports.ipc_reader is None:
            raise TransferRefused("transport", "this server maps no memory of others")
        return self._transports.ipc_reader

    @property
    def _reader(self) -> NixlReader:
        if self._transports.nixl_reader is None:
            raise TransferRefused("transport", "this server does not read with NIXL")
        return self._transports.nixl_reader

    async def _read(self, writer: Writer, shipped: transfer_pb2.Shipped) -> None:
        """Begin to read pages out of the sender's pool."""
        if len(self._reads) == MAX_READS:
            await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._read_and_deliver(writer, shipped))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)

    async def _read_and_deliver(self, writer: Writer, shipped: transfer_pb2.Shipped) -> None:
        try:
            landing = await self._landing(writer, shipped)
            try:
                place = wire.place_of(shipped.pages)
                self._inbound.deliver_checked(writer, place, landing.memory, self._clock(), landing.release)
            except BaseException:
                landing.release()
                raise
        except TransferRefused as error:
            self._inbound.fail(writer, error)
        except Exception as error:  # a bug, which is not to leave the transfer waiting
            logger.exception("pages could not be read")
            self._inbound.fail(writer, TransferRefused("internal", repr(error)))

    async def _landing(self, writer: Writer, shipped: transfer_pb2.Shipped) -> Landing:
        """Pages as they were read, their checksum right."""
        if writer.transport == "cuda_ipc":
            return await self._ipc_reader.read(
                self._opening.cuda_ipc, writer.layout, shipped, self._stall_timeout_s
            )
        return await read_shipped(
            self._reader, self._opening.nixl, writer.layout, shipped, self._stall_timeout_s
        )
