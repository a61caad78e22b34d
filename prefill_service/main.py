"""The prefill server's process."""

import asyncio

from baton.config import WorkerConfig
from baton.core.ports import LoadedEngine
from baton.engine.factory import load_engine
from baton.engine.host import EngineHost
from baton.rpc import lifecycle
from baton.rpc.server import RpcServer
from baton.rpc.worker_server import Worker, serve_until_stopped
from prefill_service.service import PrefillService


def run(config: WorkerConfig) -> None:
    """Load the model and serve until a signal. Raises StartupError."""
    lifecycle.run(_main(config))


async def _main(config: WorkerConfig) -> None:
    await serve(config, load_engine(config.model_dir, config.engine))


async def serve(config: WorkerConfig, loaded: LoadedEngine) -> None:
    """Serve with a model that is loaded, until a signal. Raises StartupError."""
    engine = EngineHost(config.engine, loaded)
    worker = Worker(config, engine)
    server = RpcServer(config.cluster_token)
    async with asyncio.TaskGroup() as tasks:
        service = PrefillService(config, engine, worker, tasks)
        worker.sessions.handler = service
        engine.start(service.on_output)
        watcher = tasks.create_task(engine.watch())
        try:
            await serve_until_stopped(config, server, worker.sessions, ())
        finally:
            watcher.cancel()
            await engine.stop()
            await service.sender.close()
