"""Tokens a second in one's own process beside a server's: 64 prompts at once, 64 tokens in and 128 out.

    python -m bench.offline MODEL http://127.0.0.1:8000 -- baton serve MODEL --role both --port 8000

Each runs alone, in turn: the server under the load client, then LLM.generate. Figures are medians of --runs.
"""

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import time

from baton import LLM, SamplingParams
from bench.first_token import STOP_TIMEOUT_S, first_token_s
from bench.load import Workload, run
from bench.report import print_table, save

WORKLOAD = Workload(num_input_tokens=64, num_output_tokens=128, concurrency=64, num_requests=64)


def of_server(url: str, command: list[str], runs: int) -> list[float]:
    """Tokens a second of each run; the first one, which warms up, is left out."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        _, model = first_token_s(url, process, time.monotonic())
        return [asyncio.run(run(url, model, WORKLOAD, seed))["output tok/s"] for seed in range(runs + 1)][1:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


def of_process(model: str, runs: int) -> list[float]:
    """The same of LLM.generate."""
    params = SamplingParams(temperature=0.0, max_tokens=WORKLOAD.num_output_tokens, ignore_eos=True)
    rates = []
    with LLM(model) as llm:
        for seed in range(runs + 1):
            started = time.perf_counter()
            outputs = llm.generate(WORKLOAD.prompts(seed), params, use_tqdm=False)
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            rates.append(num_tokens / (time.perf_counter() - started))
    return rates[1:]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("url")
    parser.add_argument("command", nargs="+")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    server = of_server(arguments.url.rstrip("/"), arguments.command, arguments.runs)
    process = of_process(arguments.model, arguments.runs)
    rows = [
        {"where": where, "output tok/s": round(statistics.median(rates), 1)}
        for where, rates in (("server, 64 streams", server), ("LLM.generate", process))
    ]
    print_table("In one's own process", rows)
    if arguments.save:
        print(save("offline", rows))


if __name__ == "__main__":
    main()
