"""Real processes whose KV transfers go through a proxy that can break them."""

import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.processes import DEMO_MODEL, Cluster
from tests.faults.proxy import HOST, FaultProxy
from tests.free_ports import free_port

# The deadlines that the servers run with here, in seconds. Below 5: then HTTP/2's pings find a silence too.
STALL_TIMEOUT_S = 2.0
TRANSFER_DEADLINE_S = 4.0

# float32, so that tokens don't depend on what else is in the batch. Small steps, so that a prompt travels in
# many messages, each small enough for one frame of HTTP/2. A pool without room for the pages of two long
# prompts, so that those of a failed transfer are used again.
ENGINE_FLAGS = (
    "--dtype=float32",
    "--max-num-batched-tokens=64",
    "--max-model-len=1536",
    "--kv-cache-memory=4MiB",
)
_ROLES = ("prefill", "decode")


@dataclass
class FaultyCluster(Cluster):
    """Prefill reaches decode through the proxy; the router reaches both directly."""

    proxy: FaultProxy = field(kw_only=True)
    decode_port: int = field(kw_only=True)

    def worker_address(self, role: str) -> str:
        """Where a worker listens."""
        return f"{HOST}:{self.decode_port}" if role == "decode" else super().worker_address(role)

    def start_worker(self, role: str, *flags: str) -> None:
        """Start the prefill or decode server."""
        if role == "decode":
            flags = (
                f"--advertise={self.proxy.address}",
                f"--transfer-deadline={TRANSFER_DEADLINE_S}",
                *flags,
            )
        else:
            flags = (f"--transfer-stall-timeout={STALL_TIMEOUT_S}", *flags)
        super().start_worker(role, *flags)

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """SIGSTOP, then SIGCONT."""
        process = self.processes[name]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def outcomes(self, role: str) -> Counter[str]:
        """How many transfers of a worker have come to which end."""
        prefix, suffix = 'baton_worker_transfers_total{outcome="', f'",role="{role}",'
        return Counter(
            {
                name.removeprefix(prefix).partition(suffix)[0]: int(value)
                for name, value in self.metrics().items()
                if name.startswith(prefix) and suffix in name
            }
        )

    def num_bytes_by(self, transport: str) -> float:
        """KV bytes that decode has received by a transport."""
        name, labels = "baton_worker_transport_bytes_total", f'role="decode",transport="{transport}"'
        return sum(v for key, v in self.metrics().items() if key.startswith(f"{name}{{{labels}"))

    def is_idle(self) -> bool:
        """Whether both workers are there, no request is anywhere, and no page is held."""
        metrics = self.metrics()

        def of_worker(name: str, role: str) -> float | None:
            return metrics.get(f'baton_worker_{name}{{role="{role}",worker="{role}"}}')

        return metrics["baton_queue_requests"] == 0 and all(
            of_worker("up", role) == 1
            and of_worker("num_free_blocks", role) == of_worker("num_blocks", role)
            and all(of_worker(f"num_{what}", role) == 0 for what in ("running", "waiting", "reserved"))
            for role in _ROLES
        )

    def revive(self) -> None:
        """Start again what was killed."""
        for role in _ROLES:
            if role not in self.processes:
                self.start_worker(role)
        self.wait_ready()


@contextmanager
def running_faulty_cluster(transport: str) -> Iterator[FaultyCluster]:
    """A cluster that serves, and is no slower for the proxy; stopped at the end."""
    flags = (*ENGINE_FLAGS, f"--kv-transport={transport}")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="baton-") as directory, FaultProxy(port) as proxy:
        cluster = FaultyCluster(DEMO_MODEL, Path(directory), flags, proxy=proxy, decode_port=port)
        try:
            for role in _ROLES:
                cluster.start_worker(role)
            cluster.start_router()
            cluster.wait_ready()
            yield cluster
        finally:
            cluster.stop()
