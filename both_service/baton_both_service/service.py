"""A worker of both roles: a prefill and a decode server on one engine, for whom nothing has to travel."""

import asyncio

import grpc

from baton.config import WorkerConfig
from baton.core.commands import EngineOutput
from baton.core.request import EngineRequest
from baton.engine.async_engine import AsyncEngine
from baton.rpc.worker_server import Worker
from baton.v1 import transfer_pb2
from baton_decode_service.service import DecodeService
from baton_prefill_service.service import PrefillService


class BothService:
    """Hands each command to the role that it is for, and what the engine did to both.

    A request is of one role here for as long as it lives, and each role passes over what is not its own:
    of prefill while its pages go to another decode server, else of decode.
    """

    def __init__(
        self, config: WorkerConfig, engine: AsyncEngine, worker: Worker, tasks: asyncio.TaskGroup
    ) -> None:
        self._worker = worker
        self.prefill_role = PrefillService(config, engine, worker, tasks)
        self.decode_role = DecodeService(config, engine, worker, tasks)
        self.grpc_services = self.decode_role.grpc_services

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let prefill servers send pages."""
        self.decode_role.add_to(server)

    async def close(self) -> None:
        """Let go of connections to other workers."""
        await self.prefill_role.close()
        await self.decode_role.close()

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> None:
        """Take pages for a prompt that another server computes."""
        self.decode_role.reserve(request)

    def prefill(self, request: EngineRequest, ticket: transfer_pb2.Ticket | None) -> None:
        """Compute a prompt whose pages go to another server. Raises InvalidRequest where they can't."""
        self.prefill_role.prefill(request, ticket)

    def run_here(self, request: EngineRequest) -> None:
        """Compute a prompt and go on from it."""
        self.decode_role.run_here(request)

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request, or one choice of it."""
        if self.prefill_role.holds(request_id):
            self.prefill_role.abort(request_id, choice)
        else:
            self.decode_role.abort(request_id, choice)

    # --- from the engine ----------------------------------------------------------------------------

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        if not output.is_within_step:
            self._worker.send_step(output)
        self.prefill_role.take(output)
        self.decode_role.take(output)
