"""Transfers between two processes on one GPU: `bench.gpu_check`'s part `transfers`."""

import asyncio
import os
import random
import secrets
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from bench.gpu_figures import Figure
from bench.gpu_model import LLAMA_8B
from bench.page_to_page import row as page_to_page
from bench.report import summary
from bench.sessions import Timeline, open_pair
from bench.workers import Processes, wait_for_channel

PROMPT_TOKENS = 4096
NUM_REQUESTS, NUM_WARM_UP = 10, 2
TRANSPORTS = ("cuda_ipc", "grpc")  # NCCL does not connect two processes on one GPU


def transfers() -> Iterator[Figure]:
    """Page to page without an engine, then handovers between two servers of Llama 8B's shape.

    Raises the first error when all that can be measured is.
    """
    errors: list[Exception] = []
    for measure in (_page_to_page, _handovers):
        for transport in TRANSPORTS:
            try:
                yield from measure(transport)
            except Exception as error:  # whatever goes wrong with one transport, the others are measured
                traceback.print_exc()
                errors.append(error)
    if errors:
        raise errors[0]


def _page_to_page(transport: str) -> Iterator[Figure]:
    measured = page_to_page(transport, NUM_REQUESTS, "cuda")
    bar = 1.5 if transport == "grpc" else None
    yield Figure(f"page to page, {transport}", measured["GB/s p50"], "GB/s", at_least=bar)
    yield Figure(f"page to page, {transport}, CPU time", measured["CPU s/GB"], "s/GB")


def _handovers(transport: str) -> Iterator[Figure]:
    with servers("bench.gpu_worker", transport) as processes:
        asked = prompts(processes, NUM_WARM_UP + NUM_REQUESTS, PROMPT_TOKENS, LLAMA_8B.vocab_size)
        timelines = asyncio.run(asked)[NUM_WARM_UP:]
    yield from handover_figures(transport, timelines)


def handover_figures(transport: str, timelines: Sequence[Timeline]) -> Iterator[Figure]:
    """From the end of prefill's last step to the start of decode's first."""
    exposed = summary([(t.decode_started - t.prefill_ended) / 1e6 for t in timelines])
    name = f"handover of {PROMPT_TOKENS} tokens, {transport}"
    bar = 10.0 if transport == "cuda_ipc" else None
    yield Figure(name, exposed["p50"], "ms", at_most=bar)
    prefill = summary([(t.prefill_ended - t.prefill_asked) / 1e6 for t in timelines])
    yield Figure(f"{name}, prefill before it", prefill["p50"], "ms")
    yield Figure(f"{name}, moved", timelines[0].moved_bytes / 1e6, "MB")


async def prompts(processes: Processes, count: int, num_tokens: int, vocab_size: int) -> list[Timeline]:
    """One after the other, each of new tokens."""
    chosen = random.Random(0)
    async with open_pair(processes) as pair:
        return [
            await pair.run([chosen.randrange(vocab_size) for _ in range(num_tokens)]) for _ in range(count)
        ]


@contextmanager
def servers(program: str, transport: str) -> Iterator[Processes]:
    """Both, which end with the block: `python -m program ROLE ADDRESS TRANSPORT`. They log to stderr."""
    token = secrets.token_hex(16)
    with TemporaryDirectory(prefix="baton-bench-") as directory:
        addresses = {role: f"unix:{directory}/{role}.sock" for role in ("prefill", "decode")}
        started: list[subprocess.Popen[bytes]] = []

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", program, *arguments, transport]
            started.append(subprocess.Popen(command, env={**os.environ, "BATON_CLUSTER_TOKEN": token}))
            return started[-1]

        try:
            for role, address in addresses.items():
                start(role, address)
            for process, address in zip(started, addresses.values(), strict=True):
                wait_for_channel(process, address)
            yield Processes(addresses["prefill"], addresses["decode"], token, start)
        finally:
            for process in started:
                process.kill()
                process.wait()
