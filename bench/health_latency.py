"""How soon a prefill server answers a health check while it computes long prompts.

    python -m bench.health_latency [--model DIR] [--prompt-tokens 2000] [--prompts 20] [--save]

The engine runs on a thread of its own, so that the event loop never waits for a forward pass; what is left is
the interpreter's lock and the cores.
"""

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.handover import DEMO_MODEL
from bench.report import percentile, print_table, save
from bench.sessions import Pair, open_pair
from bench.workers import prefill_and_decode

INTERVAL_S = 0.01
# One chunk a prompt: the longest forward passes that the model makes.
FLAGS = ["--threads=1", "--kv-cache-memory=256MiB", "--max-num-batched-tokens=4096"]


async def poll_health(address: str, stop: asyncio.Event) -> list[float]:
    """Round-trip times of health checks in milliseconds, one every INTERVAL_S until `stop`."""
    times = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while not stop.is_set():
            started = time.monotonic_ns()
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            times.append((time.monotonic_ns() - started) / 1e6)
            await asyncio.sleep(INTERVAL_S)
    return times


async def prefill_prompts(pair: Pair, num_prompts: int, num_tokens: int, vocab_size: int) -> list[float]:
    """Seconds that each prompt took to its first token."""
    random_ids = random.Random(0)
    seconds = []
    for _ in range(num_prompts):
        prompt = [random_ids.randrange(10, vocab_size) for _ in range(num_tokens)]
        timeline = await pair.run(prompt)
        seconds.append((timeline.first_token - timeline.prefill_asked) / 1e9)
    return seconds


async def measure(model_dir: Path, num_prompts: int, num_tokens: int) -> dict[str, Any]:
    """The table's one row."""
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    with prefill_and_decode(model_dir, FLAGS) as processes:
        async with open_pair(processes) as pair:
            stop = asyncio.Event()
            polling = asyncio.create_task(poll_health(processes.prefill_address, stop))
            seconds = await prefill_prompts(pair, num_prompts, num_tokens, vocab_size)
            stop.set()
            times = await polling
    return {
        "prompt tokens": num_tokens,
        "one prefill ms": round(percentile(seconds, 0.5) * 1e3),
        "checks": len(times),
        **{f"health ms p{int(share * 100)}": round(percentile(times, share), 2) for share in (0.5, 0.99)},
        "health ms max": round(max(times), 2),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    rows = [asyncio.run(measure(arguments.model, arguments.prompts, arguments.prompt_tokens))]
    print_table("Health checks of a prefill server at work", rows)
    if arguments.save:
        print(save("health-latency", rows))


if __name__ == "__main__":
    main()
