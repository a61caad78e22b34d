"""Real processes: one router, prefill and decode servers, as `baton serve` or a cluster runs them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.free_ports import free_port

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "baton" / "demo_model"
START_TIMEOUT_S = 90.0
TOKEN = "the token of the tests' cluster"


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Poll until something outside this process is so; fails the test at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


@dataclass
class Cluster:
    """A running cluster; addresses are fixed, processes come and go."""

    model_dir: Path
    directory: Path
    engine_flags: tuple[str, ...]
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    http: httpx.Client = field(default_factory=httpx.Client)  # one for all polls: to make one takes long

    @property
    def url(self) -> str:
        """Where the router's HTTP API is."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """Where the router's gRPC API is."""
        return f"127.0.0.1:{self.grpc_port}"

    def worker_address(self, role: str) -> str:
        """Where a worker listens."""
        return f"unix:{self.directory}/{role}.sock"

    def start_worker(self, role: str, *flags: str) -> None:
        """Start the prefill or decode server."""
        listen = ("--listen", self.worker_address(role), "--worker-id", role)
        self._start(role, role, *listen, "--threads=1", *self.engine_flags, *flags)

    def start_second_decode(self) -> None:
        """Start one more decode server, as process `decode 2`, and the router again, which is to know it."""
        address = f"unix:{self.directory}/decode2.sock"
        listen = ("--listen", address, "--worker-id", "decode-2")
        self._start("decode 2", "decode", *listen, "--threads=1", *self.engine_flags)
        self.kill("router")
        self.start_router(f"--decode={address}")

    def start_router(self, *flags: str) -> None:
        """Start the router."""
        workers = [f"--{role}={self.worker_address(role)}" for role in ("prefill", "decode")]
        ports = [f"--port={self.http_port}", f"--grpc-port={self.grpc_port}"]
        self._start(
            "router",
            "router",
            "--served-model-name",
            "demo",
            "--enable-dev-endpoints",
            *workers,
            *ports,
            *flags,
        )

    def wait_ready(self) -> None:
        """Wait until a request would be taken."""

        def is_ready_or_dead() -> bool:
            return self.is_ready() or any(process.poll() is not None for process in self.processes.values())

        wait_until(is_ready_or_dead, "the cluster serves", START_TIMEOUT_S)
        assert self.is_ready(), self.logs()

    def is_ready(self) -> bool:
        """Whether /health says so."""
        try:
            return self.http.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End every process."""
        self.http.close()
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
        for name, process in self.processes.items():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{name} did not stop at SIGINT\n{self.logs()}") from None

    def logs(self) -> str:
        """What the processes have printed."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in self.directory.glob("*.log"))

    def metrics(self) -> dict[str, float]:
        """Samples of the router's /metrics, by name and labels as printed."""
        lines = self.http.get(f"{self.url}/metrics").text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def worker_metric(self, name: str, role: str) -> float:
        """A worker's metric."""
        return self.metrics()[f'baton_worker_{name}{{role="{role}",worker="{role}"}}']

    def pages_are_free(self) -> bool:
        """Whether no request holds a page anywhere."""
        return all(
            self.worker_metric("num_free_blocks", role) == self.worker_metric("num_blocks", role)
            for role in ("prefill", "decode")
        )

    def _start(self, name: str, *arguments: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "baton_launch.main", *arguments, "--model", str(self.model_dir)],
                stdout=log,
                stderr=log,
                cwd=ROOT,  # so that the processes run what is tested, wherever else Baton is installed
                env={**os.environ, "BATON_CLUSTER_TOKEN": TOKEN},
            )


@contextmanager
def running_cluster(model_dir: Path = DEMO_MODEL, *engine_flags: str) -> Iterator[Cluster]:
    """A cluster that serves; stopped at the end."""
    # Socket paths may be about 100 characters long; pytest's directories are too deep.
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        flags = engine_flags or ("--kv-cache-memory=64MiB",)
        cluster = Cluster(model_dir, Path(directory), flags)
        try:
            cluster.start_worker("prefill")
            cluster.start_worker("decode")
            cluster.start_router()
            cluster.wait_ready()
            yield cluster
        finally:
            cluster.stop()
