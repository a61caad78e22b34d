"""What more requests at once cost: tokens a second, and the router's share of a core (Linux).

    python -m bench.concurrency http://127.0.0.1:8000 -- baton serve --role both MODEL --port 8000

Starts the command and runs the same load, 64 tokens in and 256 out, at each number of streams in turn, --runs
times; figures are medians. "router, ms per 1,000 tokens" is CPU time of the router's process: with 250 it
takes a quarter of a core at 1,000 tokens a second.
"""

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

from bench.first_token import STOP_TIMEOUT_S, family_of, first_token_s
from bench.load import Workload, median_of, run
from bench.report import print_table, save

STREAMS = (1, 8, 32, 64)
NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS = 64, 256


def router_pid(root: int) -> int:
    """The router among the processes of `baton serve`. Raises SystemExit where there is none."""
    for pid in sorted(family_of(root)):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"router" in arguments:
            return pid
    raise SystemExit("the command has started no router")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(url: str, model: str, router: int, streams: int, seed: int) -> dict[str, float]:
    """One run."""
    workload = Workload(NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS, streams, 2 * streams)
    before = cpu_seconds(router)
    figures = asyncio.run(run(url, model, workload, seed))
    thousands = workload.num_requests * NUM_OUTPUT_TOKENS / 1000
    return {
        "output tok/s": figures["output tok/s"],
        "median TPOT ms": figures["median TPOT ms"],
        "router, ms per 1,000 tokens": (cpu_seconds(router) - before) / thousands * 1000,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("command", nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    process = subprocess.Popen(arguments.command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        _, model = first_token_s(url, process, time.monotonic())
        router = router_pid(process.pid)
        runs: dict[int, list[dict[str, float]]] = {streams: [] for streams in STREAMS}
        for number, streams in itertools.product(range(arguments.runs), STREAMS):
            runs[streams].append(measure(url, model, router, streams, 1000 * streams + number))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)
    rows = [{"streams": streams, **median_of(of_streams)} for streams, of_streams in runs.items()]
    print_table("Streams at once", rows)
    if arguments.save:
        print(save("concurrency", rows))


if __name__ == "__main__":
    main()
