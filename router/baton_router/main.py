"""The router's process: HTTP and gRPC front doors over one pool of workers."""

import asyncio
import gc
import logging
import socket

from prometheus_client import CollectorRegistry

from baton.config import RouterConfig
from baton.core.errors import StartupError, Unavailable
from baton.fingerprint import config_digest
from baton.model_files import (
    max_position_embeddings,
    read_config,
)
from baton.rpc import lifecycle
from baton.rpc.lifecycle import DRAIN_TIMEOUT_S, StopSignals
from baton.rpc.server import RpcServer
from baton.v1 import inference_pb2_grpc
from baton_router.grpc_front import InferenceServicer
from baton_router.http.app import create_app
from baton_router.http.server import HttpServer
from baton_router.http.server_info import shown_options
from baton_router.metrics import FrontMetrics
from baton_router.pool_metrics import PoolCollector
from baton_router.requests.admission import Admission
from baton_router.requests.worker_backend import WorkerBackend
from baton_router.served_model import ServedModel, load_served_model
from baton_router.vllm_metrics import VllmNames
from baton_router.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0  # for the errors that cut requests end with


def run(config: RouterConfig) -> None:
    """Serve until a signal. Raises StartupError."""
    lifecycle.run(_main(config))


async def _main(config: RouterConfig) -> None:
    signals = StopSignals()
    pool = WorkerPool(config, config_digest(config.model_dir))
    admission = Admission(config.max_queue, lambda: pool.capacity)
    served = _served_model(config, pool, admission)
    listener = _listen(config.host, config.http_port)
    rpc = RpcServer()
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(served), rpc.grpc)
    address = _address(config.host, config.grpc_port)
    await rpc.start(address, ("baton.v1.Inference",), "--grpc-port", is_serving=False)
    http = HttpServer(create_app(served, options=shown_options(config)))
    gc.freeze()  # what start-up made lives as long as the process: collections need not walk it
    async with asyncio.TaskGroup() as tasks:
        changed = asyncio.Event()

        def on_change() -> None:
            admission.update()
            changed.set()

        sessions = tasks.create_task(pool.run(on_change))
        serving = tasks.create_task(http.serve([listener]))
        logger.info(served.defaults.text())
        logger.info(served.chat.text())
        place = f"http://{_address(config.host, config.http_port)}"
        logger.info("listening at %s, and looking for workers", place)
        telling = tasks.create_task(_tell_health(rpc, pool, changed, f"'{served.model}' at {place}"))

        async def end(within_s: float) -> None:
            """Take no more, and wait for what runs."""
            http.should_exit = True
            async with asyncio.TaskGroup() as ending:
                ending.create_task(rpc.stop(within_s))
                ending.create_task(_ended(serving, within_s))

        await signals.drain_then_stop(lambda: end(DRAIN_TIMEOUT_S))
        served.backend.end_all(Unavailable("The server is stopping. Try again later."))
        await end(_LAST_WORDS_S)
        http.force_exit = True
        await asyncio.wait((serving,))
        sessions.cancel()
        telling.cancel()


async def _tell_health(rpc: RpcServer, pool: WorkerPool, changed: asyncio.Event, what: str) -> None:
    """gRPC's health checks and the log say what /health says."""
    was_ready = False
    while True:
        await changed.wait()
        changed.clear()
        is_ready = pool.is_ready
        await rpc.set_serving(is_ready)
        if is_ready and not was_ready:
            logger.info("serving %s", what)
        elif was_ready and not is_ready:
            logger.warning("not serving %s: the workers that are left can take no request", what)
        was_ready = is_ready


async def _ended(task: asyncio.Task[None], within_s: float) -> None:
    """Wait for a task without cancelling it or raising what it raises."""
    await asyncio.wait((task,), timeout=within_s)


def _served_model(config: RouterConfig, pool: WorkerPool, admission: Admission) -> ServedModel:
    longest = max_position_embeddings(read_config(config.model_dir))
    registry = CollectorRegistry()
    registry.register(PoolCollector(pool, admission))
    metrics = FrontMetrics(registry)
    max_model_len = min(longest, config.max_model_len or longest)
    registry.register(VllmNames(config.served_model_names[0], metrics, pool, admission))
    backend = WorkerBackend(pool, admission, max_model_len, metrics)
    return load_served_model(
        config.model_dir,
        config.served_model_names,
        backend,
        metrics,
        structured_outputs=config.structured_outputs_backend,
        tool_calls=config.tool_call_parser,
        reasoning=config.reasoning_parser,
        front=config.front,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartupError(
            f"port {port} on {host} can't be had ({error.strerror}): choose another with --port"
        ) from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
