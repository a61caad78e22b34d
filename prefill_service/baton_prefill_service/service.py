"""A prefill server: computes prompts and pushes their pages away while it computes."""

import asyncio
import logging

import grpc

from baton.config import WorkerConfig
from baton.core.commands import EngineCommand, EngineOutput, FailureReason, ReleasePages
from baton.core.errors import InvalidRequest, TransferRefused
from baton.core.request import EngineRequest
from baton.core.ticket import Ticket
from baton.engine.async_engine import AsyncEngine
from baton.rpc import codec
from baton.rpc.worker_server import Worker
from baton.v1 import transfer_pb2
from baton_kv_transfer.sender import OutgoingTransfer, TransferSender
from baton_kv_transfer.transports.registry import SendingTransports
from baton_prefill_service.handover import PrefillHandover

logger = logging.getLogger(__name__)


class PrefillService:
    """Joins sessions, the handover, the engine and transfers; all of it on the event loop's thread."""

    grpc_services = ()

    def __init__(
        self, config: WorkerConfig, engine: AsyncEngine, worker: Worker, tasks: asyncio.TaskGroup
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._tasks = tasks
        self._stats = worker.stats
        self.sessions = worker.sessions
        self._handover = PrefillHandover(engine.store.layout.num_layers, self)
        self.sender = TransferSender(
            engine.store,
            config.cluster_token,
            self._stats,
            SendingTransports(engine.store, config.asked_kv_transport),
            asked_transport=config.asked_kv_transport,
            stall_timeout_s=config.transfer_stall_timeout_s,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Nothing: nobody sends pages here."""

    async def close(self) -> None:
        """Close the connections to decode servers."""
        await self.sender.close()

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> None:
        """Not this server's work."""
        raise InvalidRequest("this is a prefill server: reserve pages on a decode server")

    def prefill(self, request: EngineRequest, ticket: transfer_pb2.Ticket | None) -> None:
        """Compute the prompt; with a ticket push its pages to the decode server meanwhile.

        Raises InvalidRequest where the decode server can't take this server's pages.
        """
        self._handover.prefill(request, None if ticket is None else codec.ticket_from_proto(ticket))

    def run_here(self, request: EngineRequest) -> None:
        """Not this server's work."""
        raise InvalidRequest("this is a prefill server: prompts don't go on here")

    def holds(self, request_id: str) -> bool:
        """Whether the request is one of prefill's that has not ended."""
        return self._handover.holds(request_id)

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request, or one choice of it."""
        self._handover.abort(request_id, choice)

    # --- from the engine ----------------------------------------------------------------------------

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        if not output.is_within_step:
            self._worker.send_step(output)
        self.take(output)

    def take(self, output: EngineOutput) -> None:
        """Handle what there is in it of prefill's requests."""
        for event in output.tokens:
            self._handover.token(event)
        for pages in output.pages:
            self._handover.pages(pages)
        for failure in output.failures:
            self._handover.failed(failure.request_id, failure.reason, failure.message)

    # --- effects of the handover (baton_prefill_service.handover.Effects) -----------------------------------

    def submit(self, command: EngineCommand) -> None:
        """Give the engine a command."""
        self._engine.submit(command)

    def begin(self, ticket: Ticket) -> "_Push":
        """Begin a transfer. Raises TransferRefused."""
        transfer = self.sender.begin(ticket, self._release)
        return _Push(transfer, self._tasks.create_task(self._push(ticket.request_id, transfer)))

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the request's router that this worker gives it up."""
        self.sessions.fail(request_id, reason, message)

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self.sessions.forget(request_id)

    # --- transfers ----------------------------------------------------------------------------------

    async def _push(self, request_id: str, transfer: OutgoingTransfer) -> None:
        """Owns one transfer from its first page to its end."""
        try:
            report = await transfer.run()
            self.sessions.send(request_id, lambda number: codec.report_to_proto(number, report))
            self._handover.transfer_ended(request_id)
        except TransferRefused as error:
            logger.warning("transfer of %s failed: %s", request_id, error)
            message = f"The KV transfer failed: {error}."
            self._handover.transfer_failed(request_id, FailureReason.TRANSFER, message)
        except Exception as error:  # a bug, which must not cost the requests of others
            logger.exception("transfer of %s failed", request_id)
            message = f"The KV transfer failed: {error!r}."
            self._handover.transfer_failed(request_id, FailureReason.INTERNAL, message)
        # No step may come for a while: the routers' metrics are to show how the transfer ended now.
        self._worker.send_step(EngineOutput(self._engine.load))

    def _release(self, blocks: tuple[int, ...]) -> None:
        if blocks:
            self._engine.submit(ReleasePages(blocks))


class _Push:
    """A transfer and the task that runs it (baton_prefill_service.handover.Outgoing)."""

    def __init__(self, transfer: OutgoingTransfer, task: asyncio.Task[None]) -> None:
        self.first_block = transfer.first_block
        self.send_pages = transfer.send_pages
        self.commit = transfer.commit
        self.withdraw = transfer.withdraw
        self._task = task

    def cancel(self) -> None:
        """Cut it; its pages are given back."""
        self._task.cancel()
