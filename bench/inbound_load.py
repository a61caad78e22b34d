"""What a large inbound transfer costs the requests that a decode server is serving meanwhile.

    python -m bench.inbound_load [--transports grpc nccl nixl] [--save]

One decode server runs a batch of requests; another process pushes 1 GB of KV into pages that it has reserved.
The time between two tokens is that between the ends of the steps that computed them, by the server's clock;
the 99th percentile while pages arrive is set beside that of the same batch before and after, because steps
grow longer as contexts do.
"""

import argparse
import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.kv_layout import KVLayout
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.reservation import FramePlace
from baton.core.sampling import SamplingParams
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.v1 import worker_pb2
from baton_kv_transfer.sender import TransferSender
from baton_kv_transfer.transports.registry import SendingTransports
from bench.page_to_page import NumpyPages
from bench.random_model import random_llama
from bench.report import percentile, print_table, save
from bench.sessions import Session, open_session
from bench.workers import Processes, prefill_and_decode

TRANSPORTS = ("grpc", "nccl", "nixl")
BATCH = 8  # requests that decode
BATCH_PROMPT = 64  # tokens
PROMPT_TOKENS = 8000
INBOUND_BYTES = 10**9
QUIET_S = 10.0  # before, and again after
POOL_BLOCKS = PROMPT_TOKENS // 16


@dataclass(frozen=True)
class Window:
    """From when to when, in nanoseconds of the machine's monotonic clock."""

    started: int
    ended: int


class Decode:
    """A session with the decode server, a sender to it, and the steps that it has reported."""

    def __init__(self, session: Session, sender: TransferSender) -> None:
        self._session = session
        self._sender = sender
        self._numbers = itertools.count(1)
        self._tickets: dict[int, asyncio.Future[Ticket]] = {}
        self.step_ends: list[int] = []

    async def listen(self) -> None:
        """Note what the server says, for ever."""
        while True:
            event = await self._session.next_event()
            if event.HasField("reserved"):
                self._tickets[event.reserved.number].set_result(
                    codec.ticket_from_proto(event.reserved.ticket)
                )
            elif event.step_output.ended_ns and event.step_output.token_ids:
                self.step_ends.append(event.step_output.ended_ns)

    async def push(self, num_tokens: int, max_tokens: int, *, commits: bool) -> int:
        """Reserve a prompt's pages and fill them; then let it decode, or take it back. Returns its bytes."""
        number = next(self._numbers)
        self._tickets[number] = asyncio.get_running_loop().create_future()
        work = codec.work_to_proto(number, self._request(number, num_tokens, max_tokens))
        await self._session.send(worker_pb2.Command(reserve=worker_pb2.Reserve(work=work)))
        ticket = await self._tickets[number]
        transfer = self._sender.begin(ticket, lambda blocks: None)
        layout = ticket.layout
        num_blocks = layout.blocks_for(num_tokens)
        transfer.send_pages(FramePlace(0, num_blocks, 0, layout.num_layers), tuple(range(num_blocks)))
        if commits:
            transfer.commit([5], [])
        else:
            transfer.withdraw()
        await transfer.run()
        return num_blocks * layout.bytes_per_block

    def _request(self, number: int, num_tokens: int, max_tokens: int) -> EngineRequest:
        token_ids = tuple((number + index * 7) % 1000 for index in range(num_tokens))
        seed = chain_seed(self._session.welcome.model_fingerprint, str(number))
        return EngineRequest(
            request_id=f"bench-{number}",
            prompt_token_ids=token_ids,
            hash_seed=seed,
            block_hashes=tuple(block_hashes(seed, token_ids, self._session.welcome.layout.block_size)),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        )


def gaps_ms(step_ends: Sequence[int], window: Window) -> list[float]:
    """Times between tokens within a window."""
    inside = [end for end in step_ends if window.started <= end <= window.ended]
    return [(later - sooner) / 1e6 for sooner, later in itertools.pairwise(inside)]


async def measure(processes: Processes, transport: str) -> dict[str, Any]:
    """One line of the table."""
    async with open_session(processes.decode_address, processes.token) as session:
        layout: KVLayout = codec.layout_from_proto(session.welcome.layout)
        store = NumpyPages(layout, POOL_BLOCKS)
        sender = TransferSender(
            store,
            processes.token,
            TransferStats(),
            SendingTransports(store, transport),
            asked_transport=transport,
            stall_timeout_s=30.0,
        )
        decode = Decode(session, sender)
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(decode.listen())
            while not sender.stats.transports[transport].num_bytes:  # a pair is made meanwhile
                await decode.push(PROMPT_TOKENS, 2, commits=False)
            for _ in range(BATCH):
                await decode.push(BATCH_PROMPT, 7000, commits=True)
            before = await window_of(asyncio.sleep(QUIET_S))
            num_bytes = 0
            started = time.monotonic_ns()
            while num_bytes < INBOUND_BYTES:
                num_bytes += await decode.push(PROMPT_TOKENS, 2, commits=False)
            busy = Window(started, time.monotonic_ns())
            after = await window_of(asyncio.sleep(QUIET_S))
            listening.cancel()
        await sender.close()
    quiet = gaps_ms(decode.step_ends, before) + gaps_ms(decode.step_ends, after)
    during = gaps_ms(decode.step_ends, busy)
    seconds = (busy.ended - busy.started) / 1e9
    return {
        "transport": transport,
        "inbound GB": round(num_bytes / 1e9, 2),
        "GB/s": round(num_bytes / 1e9 / seconds, 2),
        "steps": f"{len(quiet)}, {len(during)}",
        "quiet p50 ms": round(percentile(quiet, 0.5), 2),
        "during p50 ms": round(percentile(during, 0.5), 2),
        "quiet p99 ms": round(percentile(quiet, 0.99), 2),
        "during p99 ms": round(percentile(during, 0.99), 2),
        "p99 rise": f"{percentile(during, 0.99) / percentile(quiet, 0.99) - 1:.0%}",
    }


async def window_of(wait: Any) -> Window:
    """When something began and ended."""
    started = time.monotonic_ns()
    await wait
    return Window(started, time.monotonic_ns())


def run(transport: str, model_dir: Path) -> dict[str, Any]:
    """Start the servers and measure."""
    flags = ["--threads=1", "--kv-cache-memory=1GiB", f"--kv-transport={transport}"]
    with prefill_and_decode(model_dir, flags) as processes:
        return asyncio.run(measure(processes, transport))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    with random_llama(
        hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, max_position_embeddings=8192
    ) as model_dir:
        rows = [run(transport, model_dir) for transport in arguments.transports]
    print_table("Time between tokens while 1 GB of KV arrives", rows)
    if arguments.save:
        print(save("inbound-load", rows))


if __name__ == "__main__":
    main()
