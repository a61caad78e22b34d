"""What all workers have in common, whichever their roles: gRPC server, sessions, counts and life cycle."""

import logging
import secrets
from typing import Protocol

from baton.config import WorkerConfig
from baton.core.commands import EngineCommand, EngineOutput, ResetPrefixCache
from baton.core.page_ports import PageStore
from baton.core.request import LoadSnapshot
from baton.core.scheduler_limits import SchedulerConfig
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.rpc.allocator import keep_message_buffers
from baton.rpc.lifecycle import DRAIN_TIMEOUT_S, StopSignals
from baton.rpc.server import RpcServer
from baton.rpc.sessions import SessionHost
from baton.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

_ROLES = {
    "prefill": worker_pb2.ROLE_PREFILL,
    "decode": worker_pb2.ROLE_DECODE,
    "both": worker_pb2.ROLE_BOTH,
}
_NOUNS = {"prefill": "prefill server", "decode": "decode server", "both": "worker of both roles"}


class ServedEngine(Protocol):
    """What a worker tells routers of its engine."""

    @property
    def store(self) -> PageStore:
        """Its KV pages."""
        ...

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """Its limits."""
        ...

    @property
    def fingerprint(self) -> bytes:
        """See LoadedEngine."""
        ...

    @property
    def load(self) -> LoadSnapshot:
        """How full it is."""
        ...

    @property
    def features(self) -> frozenset[str]:
        """What it knows: baton/core/features.py."""
        ...

    def submit(self, command: EngineCommand) -> None:
        """Ask it for something."""
        ...


class Worker:
    """One worker as routers see it: sessions that greet them with what it is, and what it has counted."""

    def __init__(self, config: WorkerConfig, engine: ServedEngine) -> None:
        self.epoch = secrets.randbits(64)  # no earlier start of this worker has used it
        self.stats = TransferStats()
        self.sessions = SessionHost(
            self._welcome, engine.store.layout.block_size, lambda: engine.submit(ResetPrefixCache())
        )
        self._config = config
        self._engine = engine

    def send_step(self, output: EngineOutput) -> None:
        """Tell every router its requests' tokens of a step, and the worker's load."""
        self.sessions.send_step(output, self._load())

    def _welcome(self) -> worker_pb2.Welcome:
        limits = self._engine.scheduler_config
        return worker_pb2.Welcome(
            protocol_version=codec.PROTOCOL_VERSION,
            worker_id=self._config.worker_id,
            epoch=self.epoch,
            role=_ROLES[self._config.role],
            model_fingerprint=self._engine.fingerprint,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            layout=codec.layout_to_proto(self._engine.store.layout),
            load=self._load(),
            features=sorted(self._engine.features),
        )

    def _load(self) -> worker_pb2.Load:
        return codec.load_to_proto(self._engine.load, self.stats)


async def serve_until_stopped(
    config: WorkerConfig,
    server: RpcServer,
    sessions: SessionHost,
    service_names: tuple[str, ...],
    signals: StopSignals,
) -> None:
    """Serve until a signal: SIGTERM drains first, SIGINT ends at once. Raises StartupError."""
    keep_message_buffers()
    worker_pb2_grpc.add_WorkerServicer_to_server(sessions, server.grpc)
    await server.start(config.listen_address, ("baton.v1.Worker", *service_names), "--listen")
    logger.info("%s %s is serving at %s", _NOUNS[config.role], config.worker_id, config.listen_address)

    async def drain() -> None:
        logger.info("draining: no new requests, up to %.0f s for those that run", DRAIN_TIMEOUT_S)
        await server.set_serving(False)
        if not await sessions.drain(DRAIN_TIMEOUT_S):
            logger.warning("requests were still running after %.0f s and are cut", DRAIN_TIMEOUT_S)

    try:
        await signals.drain_then_stop(drain)
    finally:
        await server.stop()
