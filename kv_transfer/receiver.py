"""The decode side's gRPC service: brings frames to `InboundTransfers`, and its answers back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from baton.core.errors import TransferRefused
from baton.core.transfer_stats import TransferStats
from baton.v1 import transfer_pb2
from kv_transfer import wire
from kv_transfer.inbound import InboundTransfers
from kv_transfer.inbound_call import InboundCall

logger = logging.getLogger(__name__)

SERVICE = "baton.v1.Transfer"

_PushContext = grpc.aio.ServicerContext[bytes, transfer_pb2.PushResult]


class TransferReceiver:
    """Serves baton.v1.Transfer. Checks and writes happen in one go on the event loop's thread."""

    def __init__(self, inbound: InboundTransfers, clock: Callable[[], float], stats: TransferStats) -> None:
        self._inbound = inbound
        self._clock = clock
        self._stats = stats

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server. Not through the generated code, whose stubs copy payloads twice."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Push": grpc.stream_unary_rpc_method_handler(
                self.push, response_serializer=transfer_pb2.PushResult.SerializeToString
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def push(self, frames: AsyncIterator[bytes], context: _PushContext) -> transfer_pb2.PushResult:
        """See transfer.proto."""
        call = InboundCall(self._inbound)
        decided = asyncio.Event()
        reading = asyncio.create_task(self._read(call, frames, decided))
        deciding = asyncio.create_task(decided.wait())
        try:
            # Every state of a reservation has a deadline, so that one of the two comes to an end.
            await asyncio.wait((reading, deciding), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                await deciding
            return transfer_pb2.PushResult(bytes_received=call.result())
        except TransferRefused as error:
            self._stats.outcomes[error.reason] += 1
            logger.info("transfer refused (%s): %s", error.reason, error)
            raise
        finally:
            reading.cancel()
            deciding.cancel()
            call.end(self._clock())
            await asyncio.gather(reading, deciding, return_exceptions=True)

    async def _read(self, call: InboundCall, frames: AsyncIterator[bytes], decided: asyncio.Event) -> None:
        """Take frames until the last one; sets `decided` when the transfer's end is known."""
        async for frame in frames:
            is_new = call.writer is None
            call.take(wire.decode(frame), self._clock())
            if is_new:
                call.when_decided(decided.set)
            if call.is_complete:
                break
        call.no_more_frames()
        if call.is_decided:
            decided.set()
