"""How long a request hangs between prefill's last step and decode's first.

    python -m bench.handover [--model DIR] [--prompt-tokens 1000] [--requests 50] [--save]

Starts one prefill and one decode server and speaks the worker protocol to them, one request at a time, each
with a new random prompt, so that no prefix cache helps. Both servers stamp their steps with the machine's
monotonic clock; the handover is the second token's step start less the first token's step end.
"""

import argparse
import asyncio
import json
import random
from pathlib import Path
from typing import Any

from bench.report import print_table, save, summary
from bench.sessions import Timeline, open_pair
from bench.workers import prefill_and_decode

DEMO_MODEL = Path(__file__).parents[1] / "baton" / "demo_model"
NUM_WARM_UP = 3


async def measure(model_dir: Path, num_tokens: int, num_requests: int, flags: list[str]) -> list[Timeline]:
    """Timelines of requests one after the other."""
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    random_ids = random.Random(0)
    with prefill_and_decode(model_dir, flags) as processes:
        async with open_pair(processes) as pair:
            timelines = [
                await pair.run([random_ids.randrange(10, vocab_size) for _ in range(num_tokens)])
                for _ in range(NUM_WARM_UP + num_requests)
            ]
    return timelines[NUM_WARM_UP:]


def row(num_tokens: int, chunk_tokens: int, timelines: list[Timeline]) -> dict[str, Any]:
    """One line of the table."""
    handover_ms = [(t.decode_started - t.prefill_ended) / 1e6 for t in timelines]
    prefill_ms = [(t.prefill_ended - t.prefill_asked) / 1e6 for t in timelines]
    return {
        "prompt tokens": num_tokens,
        "tokens a step": chunk_tokens,
        "MB moved": round(timelines[0].moved_bytes / 1e6, 2),
        "prefill ms p50": summary(prefill_ms)["p50"],
        **{f"handover ms {name}": value for name, value in summary(handover_ms).items()},
    }


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
    rows = []
    for chunk_tokens in (512, 128):
        flags = ["--threads=1", f"--max-num-batched-tokens={chunk_tokens}", "--kv-cache-memory=256MiB"]
        timelines = asyncio.run(measure(arguments.model, arguments.prompt_tokens, arguments.requests, flags))
        rows.append(row(arguments.prompt_tokens, chunk_tokens, timelines))
    print_table(f"Handover, KV over gRPC on a Unix socket, {arguments.requests} requests", rows)
    if arguments.save:
        print(save("handover", rows))


if __name__ == "__main__":
    main()
