"""The prefill server's process."""

import asyncio

from baton.config import WorkerConfig
from baton.core.ports import LoadedEngine
from baton.engine.async_engine import AsyncEngine
from baton.engine.factory import load_engine
from baton.rpc import lifecycle
from baton.rpc.lifecycle import StopSignals
from baton.rpc.server import RpcServer
from baton.rpc.worker_server import Worker, serve_until_stopped
from baton_prefill_service.service import PrefillService


def run(config: WorkerConfig) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    # Loaded before there is an event loop, which would keep Ctrl-C waiting for the whole model.
    loaded = load_engine(config.model_dir, config.engine)
    lifecycle.run(serve(config, loaded))


async def serve(config: WorkerConfig, loaded: LoadedEngine) -> None:
    """Serve with a model that is loaded, until a signal. Raises StartupError."""
    signals = StopSignals()
    engine = AsyncEngine(config.engine, loaded)
    worker = Worker(config, engine)
    server = RpcServer(config.cluster_token)
    async with asyncio.TaskGroup() as tasks:
        service = PrefillService(config, engine, worker, tasks)
        worker.sessions.handler = service
        engine.start(service.on_output)
        watcher = tasks.create_task(engine.watch())
        try:
            await serve_until_stopped(config, server, worker.sessions, (), signals)
        finally:
            watcher.cancel()
            await engine.stop()
            await service.sender.close()
