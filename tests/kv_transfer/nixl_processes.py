"""Other processes that offer a pool with NIXL, or read one: `python -m tests.kv_transfer.nixl_processes`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from baton_kv_transfer.transports.nixl.reader import NixlReader, NixlSource, RemoteMemory

ROOT = Path(__file__).parents[2]
BYTES_PER_BLOCK = 48 << 10
NUM_BLOCKS = 700


def pool_of(seed: int) -> memoryview:
    """The bytes of a source's pool."""
    size = BYTES_PER_BLOCK * NUM_BLOCKS
    return memoryview(bytearray(np.random.default_rng(seed).bytes(size)))


@dataclass
class Source:
    """A process with a pool."""

    process: subprocess.Popen[str]
    remote: RemoteMemory
    pool: memoryview  # what it holds

    def kill(self) -> None:
        """As a machine loses power."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """Let it hang, until `go_on`."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        """End `stop`."""
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """One of the programs below."""
    command = [sys.executable, "-m", "tests.kv_transfer.nixl_processes", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints; nothing else may stand on its stdout."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@contextmanager
def running_source(seed: int) -> Iterator[Source]:
    """A process that offers `pool_of(seed)`."""
    with running("source", str(seed)) as process:
        yield Source(process, _decoded(line_of(process)), pool_of(seed))


def encoded(remote: RemoteMemory) -> str:
    """For a command line."""
    return json.dumps(asdict(remote) | {"agent_metadata": remote.agent_metadata.hex()})


def _decoded(line: str) -> RemoteMemory:
    fields = json.loads(line)
    return RemoteMemory(**(fields | {"agent_metadata": bytes.fromhex(fields["agent_metadata"])}))


def _offer(seed: str) -> None:
    source = NixlSource(pool_of(int(seed)), BYTES_PER_BLOCK, NUM_BLOCKS)
    print(encoded(source.remote), flush=True)
    sys.stdin.read()
    source.close()


async def _read_on(remote: RemoteMemory) -> None:
    """Say so and read until killed."""
    reader = NixlReader()

    ranges = [(offset, 1 << 16) for offset in range(0, reader.slot_bytes * 2, 1 << 17)]

    async def read_on() -> None:
        while True:
            (await reader.read(remote, ranges, crc=None, timeout_s=10)).release()

    await reader.connect(remote, timeout_s=10)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(read_on())
        print("reading", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "source":
        _offer(sys.argv[2])
    else:
        asyncio.run(_read_on(_decoded(sys.argv[2])))
