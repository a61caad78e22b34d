"""What prefill and decode servers have in common: their gRPC server, sessions and life cycle."""

import logging
import secrets
from collections.abc import Callable

from baton.config import WorkerConfig
from baton.core.kv_layout import KVLayout
from baton.core.scheduler import SchedulerConfig
from baton.rpc import codec
from baton.rpc.lifecycle import DRAIN_TIMEOUT_S, StopSignals
from baton.rpc.server import RpcServer
from baton.rpc.sessions import SessionHost
from baton.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_ROLES = {"prefill": worker_pb2.ROLE_PREFILL, "decode": worker_pb2.ROLE_DECODE}


def new_epoch() -> int:
    """A number that no earlier start of this worker has used: 64 random bits."""
    return secrets.randbits(64)


def make_session_host(
    config: WorkerConfig,
    epoch: int,
    limits: SchedulerConfig,
    layout: KVLayout,
    fingerprint: bytes,
    load: Callable[[], worker_pb2.Load],
) -> SessionHost:
    """Sessions that greet routers with what this worker is."""

    def welcome() -> worker_pb2.Welcome:
        return worker_pb2.Welcome(
            protocol_version=codec.PROTOCOL_VERSION,
            worker_id=config.worker_id,
            epoch=epoch,
            role=_ROLES[config.role],
            model_fingerprint=fingerprint,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            layout=codec.layout_to_proto(layout),
            load=load(),
        )

    return SessionHost(welcome, layout.block_size)


async def serve_until_stopped(
    config: WorkerConfig, server: RpcServer, sessions: SessionHost, service_names: tuple[str, ...]
) -> None:
    """Serve until a signal: SIGTERM drains first, SIGINT ends at once. Raises StartupError."""
    signals = StopSignals()
    worker_pb2_grpc.add_WorkerServicer_to_server(sessions, server.grpc)
    await server.start(config.listen_address, ("baton.v1.Worker", *service_names), "--listen")
    logger.info("%s server %s is serving at %s", config.role, config.worker_id, config.listen_address)

    async def drain() -> None:
        logger.info("draining: no new requests, up to %.0f s for those that run", DRAIN_TIMEOUT_S)
        await server.set_serving(False)
        if not await sessions.drain(DRAIN_TIMEOUT_S):
            logger.warning("requests were still running after %.0f s and are cut", DRAIN_TIMEOUT_S)

    try:
        await signals.drain_then_stop(drain)
    finally:
        await server.stop()
