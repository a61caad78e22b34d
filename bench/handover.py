"""How pages get from prefill to decode by each transport, and how long a request hangs in between.

    python -m bench.handover [--transports grpc nccl nixl] [--requests 50] [--save]

Three tables. Page to page: 256 scattered blocks between two processes, checksums included, nothing computed
(see bench/page_to_page.py). Shipped model: one prefill and one decode server, one request at a time, each
with a new random prompt of 1,000 tokens; both servers stamp their steps with the machine's monotonic clock,
and the handover is the second token's step start less the first token's step end. Overlap: the same with a
prompt of 4,096 tokens in 8 chunks on a random model with 67 MB of KV for it; "exposed" is its handover as a
share of what the transfer would take with nothing to hide behind, at the speed of the first table.
"""

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.page_to_page import memcpy_gigabytes_per_second
from bench.page_to_page import row_of_new_processes as page_to_page
from bench.random_model import random_llama
from bench.report import print_table, save, summary
from bench.sessions import Pair, Timeline, open_pair
from bench.workers import prefill_and_decode

DEMO_MODEL = Path(__file__).parents[1] / "baton" / "demo_model"
TRANSPORTS = ("grpc", "nccl", "nixl")
NUM_WARM_UP = 3
MAX_WARM_UP = 50  # a pair of process groups is made while the first requests run
CHUNK_TOKENS = 512
WORKER_FLAGS = ("--threads=1", f"--max-num-batched-tokens={CHUNK_TOKENS}")


class Prompts:
    """Random prompts of one length; no prefix cache helps."""

    def __init__(self, model_dir: Path, num_tokens: int) -> None:
        self._vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
        self._random = random.Random(0)
        self._num_tokens = num_tokens

    def next(self) -> list[int]:
        """Token ids."""
        return [self._random.randrange(10, self._vocab_size) for _ in range(self._num_tokens)]


async def measure(
    model_dir: Path, num_tokens: int, num_requests: int, transport: str, flags: Sequence[str]
) -> tuple[list[Timeline], float]:
    """Timelines of requests one after the other, and the part of their transfers that was hidden."""
    prompts = Prompts(model_dir, num_tokens)
    with prefill_and_decode(model_dir, [*WORKER_FLAGS, f"--kv-transport={transport}", *flags]) as processes:
        async with open_pair(processes) as pair:
            await warm_up(pair, prompts, transport)
            before = await pair.transport_load(transport)
            timelines = [await pair.run(prompts.next()) for _ in range(num_requests)]
            after = await pair.transport_load(transport, before.num_transfers + num_requests)
    seconds = after.seconds - before.seconds
    return timelines, (seconds - after.exposed_seconds + before.exposed_seconds) / num_requests


async def warm_up(pair: Pair, prompts: Prompts, transport: str) -> None:
    """Until pages go over the transport."""
    for number in range(MAX_WARM_UP):
        await pair.run(prompts.next())
        if number >= NUM_WARM_UP and (await pair.transport_load(transport, 0)).bytes:
            return
    raise RuntimeError(f"no page has gone over {transport} in {MAX_WARM_UP} requests")


def handover_row(transport: str, timelines: list[Timeline], hidden_s: float) -> dict[str, Any]:
    """One line of the tables with servers."""
    handover_ms = [(t.decode_started - t.prefill_ended) / 1e6 for t in timelines]
    prefill_ms = [(t.prefill_ended - t.prefill_asked) / 1e6 for t in timelines]
    return {
        "transport": transport,
        "MB moved": round(timelines[0].moved_bytes / 1e6, 2),
        "prefill ms p50": summary(prefill_ms)["p50"],
        "hidden ms": round(hidden_s * 1e3, 2),
        **{f"handover ms {name}": value for name, value in summary(handover_ms).items()},
    }


def shipped_model(transports: Sequence[str], num_requests: int) -> list[dict[str, Any]]:
    """1,000 tokens of the shipped model."""
    flags = ("--kv-cache-memory=256MiB",)
    return [
        handover_row(transport, *asyncio.run(measure(DEMO_MODEL, 1000, num_requests, transport, flags)))
        for transport in transports
    ]


def overlap(speeds: dict[str, float], num_requests: int) -> list[dict[str, Any]]:
    """4,096 tokens in 8 chunks of a model whose KV is worth a transfer."""
    rows = []
    flags = ("--kv-cache-memory=512MiB",)
    with random_llama(
        hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, max_position_embeddings=8192
    ) as model_dir:
        for transport, speed in speeds.items():
            row = handover_row(
                transport, *asyncio.run(measure(model_dir, 4096, num_requests, transport, flags))
            )
            alone_ms = row["MB moved"] / speed
            share = row["handover ms p50"] / alone_ms
            rows.append(row | {"transfer alone ms": round(alone_ms, 1), "exposed": f"{share:.0%}"})
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    memcpy = memcpy_gigabytes_per_second()
    raw = [page_to_page(transport, 15) | {"memcpy GB/s": memcpy} for transport in arguments.transports]
    print_table("Page to page, 256 scattered blocks", raw)
    shipped = shipped_model(arguments.transports, arguments.requests)
    print_table(f"Shipped model, 1,000 tokens, {arguments.requests} requests", shipped)
    speeds = {row["transport"]: row["GB/s p50"] for row in raw}
    overlapped = overlap(speeds, max(5, arguments.requests // 5))
    print_table("4,096 tokens in 8 chunks", overlapped)
    if arguments.save:
        tables = {"page to page": raw, "shipped model": shipped, "overlap": overlapped}
        print(save("handover", [{"table": name, **row} for name, rows in tables.items() for row in rows]))


if __name__ == "__main__":
    main()
