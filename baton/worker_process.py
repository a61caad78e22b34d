"""A worker's process, whatever its roles: loads the model, serves until a signal, lets go of everything."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc

from baton.config import WorkerConfig
from baton.core.commands import EngineOutput
from baton.core.ports import LoadedEngine
from baton.engine.async_engine import AsyncEngine
from baton.engine.factory import load_engine
from baton.rpc import lifecycle
from baton.rpc.lifecycle import StopSignals
from baton.rpc.server import RpcServer
from baton.rpc.sessions import RequestHandler
from baton.rpc.worker_server import Worker, serve_until_stopped


class WorkerService(RequestHandler, Protocol):
    """What a worker of some role does with commands and with what its engine says."""

    @property
    def grpc_services(self) -> tuple[str, ...]:
        """Full names of the services that `add_to` registers."""
        ...

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register what other workers call."""
        ...

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        ...

    async def close(self) -> None:
        """Let go of connections to other workers."""
        ...


MakeService = Callable[[WorkerConfig, AsyncEngine, Worker, asyncio.TaskGroup], WorkerService]


def run_worker(config: WorkerConfig, make_service: MakeService) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    # Loaded before there is an event loop, which would keep Ctrl-C waiting for the whole model.
    loaded = load_engine(config.model_dir, config.engine)
    lifecycle.run(serve(config, loaded, make_service))


async def serve(config: WorkerConfig, loaded: LoadedEngine, make_service: MakeService) -> None:
    """Serve with a model that is loaded, until a signal. Raises StartupError."""
    signals = StopSignals()
    engine = AsyncEngine(config.engine, loaded)
    worker = Worker(config, engine)
    server = RpcServer(config.cluster_token)
    async with asyncio.TaskGroup() as tasks:
        service = make_service(config, engine, worker, tasks)
        service.add_to(server.grpc)
        worker.sessions.handler = service
        engine.start(service.on_output)
        watcher = tasks.create_task(engine.watch())
        try:
            await serve_until_stopped(config, server, worker.sessions, service.grpc_services, signals)
        finally:
            watcher.cancel()
            await engine.stop()
            await service.close()
