"""What the router adds to the time to first token, and its memory.

    python -m bench.router_overhead [--model DIR] [--requests 100] [--save]

In turn, one request straight to the workers (reserve, prefill, first token) and two through the router's
streaming HTTP API to its first event, all with the same prompt: it stays in the workers' prefix caches, so
that hundreds of milliseconds of prefill, and their noise, do not drown what is measured. The difference, as
the median over rounds, is HTTP, hashing, queueing, placement and detokenising where the prompt comes as token
ids, which is what the workers get; where it comes as text, the tokenizer's own time is in it too.
"""

import argparse
import asyncio
import inspect
import json
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
PROMPT_TOKENS = (100, 1000)
NUM_WARM_UP = 3


def is_ready() -> bool:
    """Whether the router takes requests."""
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health").status_code == 200
    except httpx.TransportError:
        return False


class Client:
    """A keep-alive HTTP/1.1 connection by hand: a client library costs milliseconds of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def first_event_ms(self, prompt: str | list[int]) -> float:
        """Time from sending a request to the first event of its answer."""
        request = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
        body = json.dumps(request).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        started = time.monotonic_ns()
        self._writer.write(head.encode() + body)
        await self._reader.readuntil(b"data: {")
        elapsed = (time.monotonic_ns() - started) / 1e6
        await self._reader.readuntil(b"data: [DONE]")
        await self._reader.readuntil(b"0\r\n\r\n")  # the last chunk of the body
        return elapsed


async def compare(model_dir: Path, pair: Pair, num_tokens: int, num_requests: int) -> dict[str, list[float]]:
    """Times to first token in milliseconds, each way in turn."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    # Text as people send it: what random ids decode to costs a tokenizer several times as much.
    text = tokenizer.decode(tokenizer.encode(inspect.getsource(argparse)).ids[:num_tokens])
    token_ids = tokenizer.encode(text).ids  # as the router will
    times: dict[str, list[float]] = {"direct": [], "token ids": [], "text": []}
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    client = Client(reader, writer)
    for _ in range(NUM_WARM_UP + num_requests):
        timeline = await pair.run(token_ids)
        times["direct"].append((timeline.first_token - timeline.asked) / 1e6)
        times["token ids"].append(await client.first_event_ms(token_ids))
        times["text"].append(await client.first_event_ms(text))
    writer.close()
    return {way: values[NUM_WARM_UP:] for way, values in times.items()}


async def measure(model_dir: Path, num_requests: int) -> list[dict[str, Any]]:
    """The table, a row for each length of prompt."""
    with prefill_and_decode(model_dir, FLAGS) as processes:
        ports = [f"--port={PORT}", f"--grpc-port={GRPC_PORT}"]
        router = processes.start("router", *processes.worker_options, *ports)
        wait_until(is_ready, 60)
        async with open_pair(processes) as pair:
            rows = [
                row(num_tokens, await compare(model_dir, pair, num_tokens, num_requests))
                for num_tokens in PROMPT_TOKENS
            ]
        memory = round(resident_mib(router))
    return [{**entry, "router MiB": memory} for entry in rows]


def row(num_tokens: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the table."""
    entry: dict[str, Any] = {"prompt tokens": num_tokens}
    for way, values in times.items():
        entry[f"TTFT {way} ms p50"] = summary(values)["p50"]
    for way in ("token ids", "text"):
        added = [router - direct for router, direct in zip(times[way], times["direct"], strict=True)]
        entry[f"overhead {way} ms p50"] = summary(added)["p50"]
    return entry


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments.model, arguments.requests))
    print_table(f"What the router adds to the time to first token, {arguments.requests} rounds", rows)
    if arguments.save:
        print(save("router-overhead", rows))


if __name__ == "__main__":
    main()
