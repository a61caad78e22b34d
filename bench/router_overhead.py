"""What the router adds to the time to first token, and its memory.

    python -m bench.router_overhead [--model DIR] [--prompt-tokens 1000] [--requests 50] [--save]

In turn, one request straight to the workers (reserve, prefill, first token) and one through the router's
streaming HTTP API to its first event, each with a new random text, so that no prefix cache helps. The
difference of the medians is HTTP, tokenising, hashing, queueing and placement.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer

from bench.handover import DEMO_MODEL
from bench.report import print_table, save, summary
from bench.sessions import Pair, open_pair
from bench.workers import prefill_and_decode, resident_mib, wait_until

PORT, GRPC_PORT = 8970, 8971
FLAGS = ["--threads=1", "--kv-cache-memory=256MiB"]
NUM_WARM_UP = 3


def is_ready() -> bool:
    """Whether the router takes requests."""
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health").status_code == 200
    except httpx.TransportError:
        return False


async def first_event_ms(client: httpx.AsyncClient, text: str) -> float:
    """Time from sending a request to the first event of its answer."""
    body = {"prompt": text, "max_tokens": 2, "temperature": 0, "stream": True, "add_special_tokens": False}
    started = time.monotonic_ns()
    async with client.stream("POST", f"http://127.0.0.1:{PORT}/v1/completions", json=body) as response:
        response.raise_for_status()
        lines = response.aiter_lines()
        await anext(lines)
        elapsed = (time.monotonic_ns() - started) / 1e6
        async for _ in lines:
            pass
    return elapsed


async def compare(model_dir: Path, pair: Pair, num_tokens: int, num_requests: int) -> dict[str, list[float]]:
    """Times to first token in milliseconds, both ways in turn."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    random_ids = random.Random(0)

    def new_prompt() -> tuple[str, list[int]]:
        text = tokenizer.decode([random_ids.randrange(10, vocab_size) for _ in range(num_tokens)])
        return text, tokenizer.encode(text, add_special_tokens=False).ids

    times: dict[str, list[float]] = {"direct": [], "router": []}
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(NUM_WARM_UP + num_requests):
            timeline = await pair.run(new_prompt()[1])
            times["direct"].append((timeline.first_token - timeline.asked) / 1e6)
            times["router"].append(await first_event_ms(client, new_prompt()[0]))
    return {way: values[NUM_WARM_UP:] for way, values in times.items()}


async def measure(model_dir: Path, num_tokens: int, num_requests: int) -> list[dict[str, Any]]:
    """The table."""
    with prefill_and_decode(model_dir, FLAGS) as processes:
        ports = [f"--port={PORT}", f"--grpc-port={GRPC_PORT}"]
        router = processes.start("router", *processes.worker_options, *ports)
        wait_until(is_ready, 60)
        async with open_pair(processes) as pair:
            times = await compare(model_dir, pair, num_tokens, num_requests)
        memory = resident_mib(router)
    rows: list[dict[str, Any]] = [
        {"way": way, **{f"TTFT ms {name}": value for name, value in summary(values).items()}}
        for way, values in times.items()
    ]
    overhead = statistics.median(times["router"]) - statistics.median(times["direct"])
    for entry in rows:
        entry["overhead ms"] = round(overhead, 3) if entry["way"] == "router" else ""
        entry["router MiB"] = round(memory) if entry["way"] == "router" else ""
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments.model, arguments.prompt_tokens, arguments.requests))
    print_table(f"Time to first token, {arguments.prompt_tokens} tokens of prompt", rows)
    if arguments.save:
        print(save("router-overhead", rows))


if __name__ == "__main__":
    main()
