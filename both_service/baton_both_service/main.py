"""The process of a worker of both roles."""

import asyncio

from baton.config import WorkerConfig
from baton.core.ports import LoadedEngine
from baton.engine.async_engine import AsyncEngine
from baton.engine.factory import load_engine
from baton.rpc import lifecycle
from baton.rpc.lifecycle import StopSignals
from baton.rpc.server import RpcServer
from baton.rpc.worker_server import Worker, serve_until_stopped
from baton_both_service.service import BothService


def run(config: WorkerConfig) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    # Loaded before there is an event loop, which would keep Ctrl-C waiting for the whole model.
    loaded = load_engine(config.model_dir, config.engine)
    lifecycle.run(_serve(config, loaded))


async def _serve(config: WorkerConfig, loaded: LoadedEngine) -> None:
    signals = StopSignals()
    engine = AsyncEngine(config.engine, loaded)
    worker = Worker(config, engine)
    server = RpcServer(config.cluster_token)
    async with asyncio.TaskGroup() as tasks:
        service = BothService(config, engine, worker, tasks)
        service.decode_role.receiver.add_to(server.grpc)
        worker.sessions.handler = service
        engine.start(service.on_output)
        watcher = tasks.create_task(engine.watch())
        try:
            await serve_until_stopped(config, server, worker.sessions, ("baton.v1.Transfer",), signals)
        finally:
            watcher.cancel()
            await engine.stop()
            await service.prefill_role.sender.close()
            await service.decode_role.transports.close()
