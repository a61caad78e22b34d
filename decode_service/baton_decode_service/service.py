"""A decode server: reserves pages, receives KV into them, and runs continuous batching from there."""

import asyncio
import secrets
import time

import grpc

from baton.config import WorkerConfig, available_cores, host_of
from baton.core.commands import EngineCommand, EngineOutput, FailureReason
from baton.core.errors import InvalidRequest
from baton.core.request import EngineRequest
from baton.core.reservation import Reservation
from baton.core.ticket import Ticket
from baton.engine.async_engine import AsyncEngine
from baton.rpc import codec
from baton.rpc.worker_server import Worker
from baton.v1 import transfer_pb2, worker_pb2
from baton_decode_service.handover import DecodeHandover
from baton_kv_transfer.receiver import SERVICE, TransferReceiver
from baton_kv_transfer.transfers.pace import InboundPace
from baton_kv_transfer.transports.base import ReceivingWorker
from baton_kv_transfer.transports.registry import ReceivingTransports

_TRANSFER_ID_BYTES = 16
_NO_PROMPTS = "this is a decode server: send prompts to a prefill server"


class DecodeService:
    """Joins sessions, the handover, transfers and the engine; all of it on the event loop's thread."""

    grpc_services = (SERVICE,)

    def __init__(
        self, config: WorkerConfig, engine: AsyncEngine, worker: Worker, _: asyncio.TaskGroup
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._role = config.role
        self._address = config.advertise_address
        self.transports = ReceivingTransports(engine.store, config.asked_kv_transport)
        self._stats = worker.stats
        self._timer: asyncio.TimerHandle | None = None
        self.sessions = worker.sessions
        self._handover = DecodeHandover(
            worker.epoch, engine.store, config.transfer_deadlines, self._stats, self, self.transports.writer
        )
        receiving_worker = ReceivingWorker(
            self._handover.inbound,
            self.now,
            self._stats,
            InboundPace(self._computes_beside_transfers, available_cores()),
            host=host_of(config.advertise_address) or "127.0.0.1",
            stall_timeout_s=config.transfer_stall_timeout_s,
        )
        self.receiver = TransferReceiver(receiving_worker, self.transports)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let prefill servers send pages."""
        self.receiver.add_to(server)

    async def close(self) -> None:
        """Let go of what reads other servers' pages."""
        await self.transports.close()

    def _computes_beside_transfers(self) -> bool:
        """Whether tokens come later where cores are busy with pages; a device computes beside that."""
        return self._engine.store.device_pages is None and self._engine.load.num_running > 0

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> None:
        """Ask the engine for pages; `take` answers with a ticket."""
        self._handover.reserve(request)

    def prefill(self, request: EngineRequest, ticket: transfer_pb2.Ticket | None) -> None:
        """Not this server's work."""
        raise InvalidRequest(_NO_PROMPTS)

    def run_here(self, request: EngineRequest) -> None:
        """Compute the prompt and go on from it. Raises InvalidRequest on a server of decode alone."""
        if self._role != "both":
            raise InvalidRequest(_NO_PROMPTS)
        self._handover.run_here(request)

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request, or one choice of it."""
        self._handover.abort(request_id, choice)

    # --- from the engine ----------------------------------------------------------------------------

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        self._worker.send_step(output)
        self.take(output)

    def take(self, output: EngineOutput) -> None:
        """Handle what there is in it of decode's requests."""
        for reserved in output.reserved:
            self._handover.reserved(reserved)
        for event in output.tokens:
            self._handover.token(event)
        for failure in output.failures:
            self._handover.failed(failure.request_id, failure.reason, failure.message)

    # --- effects of the handover (baton_decode_service.handover.Effects) ------------------------------------

    def submit(self, command: EngineCommand) -> None:
        """Give the engine a command."""
        self._engine.submit(command)

    def issue(self, reservation: Reservation) -> None:
        """Send the request's router a ticket."""
        ticket = Ticket(
            transfer_id=reservation.transfer_id,
            epoch=self._worker.epoch,
            request_id=reservation.request_id,
            address=self._address,
            first_block=reservation.first_block,
            num_blocks=len(reservation.block_table),
            layout=self._engine.store.layout,
            protocol_version=codec.PROTOCOL_VERSION,
            num_tokens=reservation.num_tokens,
            transports=self.transports.offer,
        )
        self.sessions.send(
            reservation.request_id,
            lambda number: worker_pb2.Event(
                reserved=worker_pb2.Reserved(number=number, ticket=codec.ticket_to_proto(ticket))
            ),
        )

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the request's router that this worker gives it up."""
        self.sessions.fail(request_id, reason, message)

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self.sessions.forget(request_id)

    def new_transfer_id(self) -> bytes:
        """Bytes that nobody can guess."""
        return secrets.token_bytes(_TRANSFER_ID_BYTES)

    def now(self) -> float:
        """Seconds of the machine's monotonic clock."""
        return time.monotonic()

    def deadlines_changed(self) -> None:
        """Wake at the next deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._handover.table.next_deadline()
        if deadline is not None:
            delay = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._handover.expire)
