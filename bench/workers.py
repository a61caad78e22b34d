"""Starts Baton's processes for a benchmark, on Unix sockets in a directory of their own."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Processes:
    """A running prefill and decode server, and what another process needs to talk to them."""

    prefill_address: str
    decode_address: str
    token: str
    start: Callable[..., subprocess.Popen[bytes]]

    @property
    def worker_options(self) -> list[str]:
        """A router's options for these workers."""
        return [f"--prefill={self.prefill_address}", f"--decode={self.decode_address}"]


@contextmanager
def prefill_and_decode(model_dir: Path, flags: Sequence[str]) -> Iterator[Processes]:
    """One server of each role that serves; both, and whatever `start` started, end with the block."""
    token = secrets.token_hex(16)
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "baton_launch.main", *arguments, "--model", str(model_dir)]
            log = (Path(directory) / f"{arguments[0]}.log").open("ab")
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "BATON_CLUSTER_TOKEN": token}
            )
            started.append(process)
            return process

        addresses = {role: f"unix:{directory}/{role}.sock" for role in ("prefill", "decode")}
        try:
            for role, address in addresses.items():
                start(role, "--listen", address, *flags)
            for process, address in zip(started, addresses.values(), strict=True):
                wait_for_channel(process, address)
            yield Processes(addresses["prefill"], addresses["decode"], token, start)
        finally:
            for process in started:
                process.kill()
                process.wait()


def wait_for_channel(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until a process's gRPC server answers. Raises RuntimeError if the process ends instead."""
    with grpc.insecure_channel(address) as channel:
        ready = grpc.channel_ready_future(channel)
        wait_until(lambda: ready.done() or process.poll() is not None, START_TIMEOUT_S)
        if not ready.done():
            raise RuntimeError(f"{process.args!r} ended with exit code {process.returncode}")


def resident_mib(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of a process in MiB (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    """Poll a condition outside this process."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.02)
