"""Two OpenAI-compatible servers under the same load on one machine, in turn.

    python -m bench.compare small baton=http://127.0.0.1:8000 vllm=http://127.0.0.1:9000 [--runs 3] [--save]

`small` and `medium` choose the rows of the table; both servers must serve that model, and may stay up all the
while: one idles as the other is measured. Each run has prompts of its own, so that no prefix cache helps, and
the same ones for both. Figures are medians over the runs; --save writes JSON and Markdown to bench/results/.
"""

import argparse
import itertools
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import uvloop

from bench.load import Workload, median_of, run
from bench.report import machine, print_table, save

WORKLOADS = {
    "small": (
        Workload(256, 64, 1, 16),
        Workload(256, 64, 8, 32),
        Workload(64, 256, 8, 24),
        Workload(64, 256, 32, 64),
        Workload(1024, 32, 8, 24),
    ),
    "medium": (
        Workload(256, 64, 1, 6),
        Workload(256, 64, 8, 24),
        Workload(64, 256, 8, 16),
    ),
}
WARM_UP = Workload(32, 8, 2, 4)


class Server:
    """One of the two."""

    def __init__(self, argument: str) -> None:
        self.name, _, self.url = argument.partition("=")
        if not self.url:
            raise argparse.ArgumentTypeError(f"write NAME=URL, not '{argument}'")
        self.url = self.url.rstrip("/")

    def model(self) -> str:
        """What it calls its model. Raises httpx.HTTPError where it does not answer."""
        models = httpx.get(f"{self.url}/v1/models").raise_for_status().json()
        return str(models["data"][0]["id"])


async def measure(servers: Sequence[Server], workload: Workload, num_runs: int, seed: int) -> dict[str, Any]:
    """One row of the table: each server's medians."""
    runs: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    models = {server.name: server.model() for server in servers}
    for number, server in itertools.product(range(num_runs), servers):
        figures = await run(server.url, models[server.name], workload, seed + number)
        runs[server.name].append(figures)
        shown = ", ".join(f"{value:.1f} {name}" for name, value in figures.items())
        print(f"  {server.name}: {shown}", flush=True)
    return {name: median_of(of_server) for name, of_server in runs.items()}


def rows_of(model: str, workload: Workload, medians: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each server, the throughput of each as a multiple of the last one's."""
    work = f"{model} {workload.num_input_tokens}/{workload.num_output_tokens}, {workload.concurrency}"
    peer = list(medians.values())[-1]["output tok/s"]
    return [
        {"workload": work, "server": name, **figures, "of peer": round(figures["output tok/s"] / peer, 2)}
        for name, figures in medians.items()
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same as a Markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{' --- |' * len(rows[0])}"]
    lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    return "\n".join((f"{machine()}; medians.", "", *lines, ""))


async def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of the model's table."""
    rows: list[dict[str, Any]] = []
    # Servers stay up from one comparison to the next: the prompts of the last one are in their prefix caches.
    seed = secrets.randbits(30) if arguments.seed is None else arguments.seed
    for server in arguments.servers:
        await run(server.url, server.model(), WARM_UP, seed)
    for index, workload in enumerate(WORKLOADS[arguments.model]):
        if arguments.rows and index not in arguments.rows:
            continue
        print(f"{arguments.model}: {workload}", flush=True)
        medians = await measure(arguments.servers, workload, arguments.runs, seed + 1000 * (index + 1))
        rows += rows_of(arguments.model, workload, medians)
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=WORKLOADS)
    parser.add_argument("servers", nargs="+", type=Server, metavar="NAME=URL", help="the peer last")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="only these rows, from 0")
    parser.add_argument("--seed", type=int, help="of the prompts; by default others each time")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    rows = uvloop.run(compare(arguments))
    print_table("Side by side", rows)
    if arguments.save:
        names = "-".join(server.name for server in arguments.servers)
        path = save(f"compare-{names}-{arguments.model}", rows)
        Path(path).with_suffix(".md").write_text(markdown(rows))
        print(path)


if __name__ == "__main__":
    main()
