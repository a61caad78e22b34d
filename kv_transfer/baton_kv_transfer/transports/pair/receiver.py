"""A decode server's side of pairs of process groups: makes its end, and brings what lands to its transfer."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from baton.core.errors import TransferRefused
from baton.rpc.first_message import first_message
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages.frames import num_payload_bytes
from baton_kv_transfer.pages.wire import place_of
from baton_kv_transfer.transports.base import ReceivingWorker
from baton_kv_transfer.transports.pair.pair_end import breaking
from baton_kv_transfer.transports.pair.process_group import Meeting
from baton_kv_transfer.transports.pair.receiving_end import Landed, ReceivingEnd
from baton_kv_transfer.transports.pair.transport import PairContext

logger = logging.getLogger(__name__)


class PairReceiver:
    """Serves Pair: one call is one pair."""

    def __init__(
        self, worker: ReceivingWorker, max_bytes: int, checksum: Callable[[Any], int] | None
    ) -> None:
        """`max_bytes`: of a message. `checksum`: of bytes on a device, for pairs between devices."""
        self._worker = worker
        self._max_bytes = max_bytes
        self._checksum = checksum

    async def pair(self, frames: AsyncIterator[transfer_pb2.PairFrame], context: PairContext) -> None:
        """See transfer.proto."""
        hello = await first_message(aiter(frames))
        if hello is None or not hello.HasField("hello"):
            raise TransferRefused("pair", "a pair begins with a hello")
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        meeting = Meeting(self._worker.host, max_bytes=self._max_bytes)
        try:
            where = transfer_pb2.PairMeeting(host=meeting.host, port=meeting.port)
            await context.write(transfer_pb2.PairReply(meeting=where))
            end: ReceivingEnd[transfer_pb2.PairPages] = await meeting.receiving_end(
                hello.hello.device,
                self._landed,
                breaking(broken),
                stall_timeout_s=self._worker.stall_timeout_s,
                checksum=self._checksum,
            )
        finally:
            meeting.close()
        try:
            await context.write(transfer_pb2.PairReply(ready=transfer_pb2.PairReady()))
            await self._expect_all(end, frames, broken)
        finally:
            broken.cancel()
            await end.close()

    async def _expect_all(
        self,
        end: ReceivingEnd[transfer_pb2.PairPages],
        frames: AsyncIterator[transfer_pb2.PairFrame],
        broken: asyncio.Future[None],
    ) -> None:
        """Pass announcements on until the call or the pair ends. Raises TransferRefused where it broke."""
        reading = asyncio.create_task(self._read(end, frames))
        try:
            await asyncio.wait((reading, broken), return_when=asyncio.FIRST_COMPLETED)
            for done in (broken, reading):
                if done.done():
                    done.result()
        except TransferRefused as error:
            logger.warning("a pair of process groups broke: %s", error)
            self._worker.stats.outcomes[error.reason] += 1
            raise
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, end: ReceivingEnd[transfer_pb2.PairPages], frames: AsyncIterator[transfer_pb2.PairFrame]
    ) -> None:
        async for frame in frames:
            if not frame.HasField("pages"):
                raise TransferRefused("pair", "a frame of a kind that this server does not know")
            # Only said, and not checked yet: no message is longer, and others wait for what is counted here.
            num_bytes = min(frame.pages.num_bytes, self._max_bytes)
            await asyncio.sleep(self._worker.pace.delay_s(num_bytes, self._worker.clock()))
            end.expect(frame.pages.num_bytes, frame.pages.pages.crc32c, frame.pages)

    def _landed(self, announced: transfer_pb2.PairPages, landed: Landed | TransferRefused) -> None:
        """A message has come, right or wrong; what it was for may be over."""
        worker, inbound, is_being_read = self._worker, self._worker.inbound, False
        try:
            writer = inbound.writer_of(announced.transfer_id, announced.epoch)
        except TransferRefused as stale:
            worker.stats.outcomes[stale.reason] += 1
        else:
            try:
                if isinstance(landed, TransferRefused):
                    raise landed
                place = place_of(announced.pages)
                if len(landed.payload) != num_payload_bytes(writer.layout, place):
                    raise TransferRefused("length", f"{len(landed.payload)} bytes that don't fit {place}")
                inbound.deliver_checked(writer, place, landed.payload, worker.clock(), landed.release)
                is_being_read = True
            except TransferRefused as error:
                inbound.fail(writer, error)
        finally:
            if isinstance(landed, Landed) and not is_being_read:
                landed.release()
