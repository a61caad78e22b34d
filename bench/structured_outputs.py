"""What a JSON schema costs: the same load with one and without, in turn.

    python -m bench.structured_outputs http://127.0.0.1:8000 -- baton serve --role both MODEL --port 8000

Starts the command and runs 64 tokens in and 128 out at 1 and 8 streams, --runs times; figures are medians.
The schema is compiled before, and describes more than 128 tokens, so that both compute as many.
"""

import argparse
import asyncio
import itertools
import os
import signal
import subprocess
import time
from typing import Any

from bench.first_token import STOP_TIMEOUT_S, first_token_s
from bench.load import Workload, median_of, run
from bench.report import print_table, save

STREAMS = (1, 8)
NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS = 64, 128
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "loyal", "lost"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": _PERSON, "minItems": 1000}
FIELDS: dict[str, dict[str, Any]] = {
    "none": {},
    "JSON schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "people", "schema": SCHEMA}}
    },
}


def measure(url: str, model: str, form: str, streams: int, seed: int) -> dict[str, float]:
    """One run."""
    fields = {**FIELDS[form], "ignore_eos": True}
    workload = Workload(NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS, streams, 4 * streams, fields)
    return asyncio.run(run(url, model, workload, seed))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("command", nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    arguments = parser.parse_args()
    url = arguments.url.rstrip("/")
    process = subprocess.Popen(arguments.command, start_new_session=True, stdout=subprocess.DEVNULL)
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    try:
        _, model = first_token_s(url, process, time.monotonic())
        loads = itertools.product(range(arguments.runs + 1), STREAMS, FIELDS)
        for seed, (number, streams, form) in enumerate(loads):  # no prompt comes twice
            figures = measure(url, model, form, streams, seed)
            if number:  # the first of each warms up
                runs.setdefault((streams, form), []).append(figures)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)
    rows = [{"streams": streams, "form": form, **median_of(found)} for (streams, form), found in runs.items()]
    print_table("What a form costs", rows)
    if arguments.save:
        print(save("structured-outputs", rows))


if __name__ == "__main__":
    main()
