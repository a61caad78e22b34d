"""Milliseconds that the tokens of one step take to be chosen on the CPU, in C and by torch, in turn.

    python -m bench.sampling [--rows 32] [--threads 2] [--save]

Normal logits in bfloat16; each row has a prompt of 2,000 tokens and 200 tokens of output.
"""

import argparse
import random
import statistics
import time
from array import array
from typing import Any
from unittest.mock import patch

import torch

from baton.core.plan import SampleTask
from baton.core.sampling import SamplingParams
from baton.engine import sampler
from baton_kernels.cpu.library import cpu_kernels
from bench.report import print_table, save

VOCABULARIES = (32_000, 128_256)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 20, top_p 0.8": {"top_k": 20, "top_p": 0.8},
    "min_p 0.05": {"min_p": 0.05},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "presence_penalty 0.5": {"presence_penalty": 0.5},
    "logprobs 5": {"num_logprobs": 5},
}


def row(vocab_size: int, setting: str, num_rows: int, repeats: int) -> dict[str, Any]:
    """Medians of both, and how many times faster C is."""
    chosen = random.Random(0)
    logits = (torch.randn(num_rows, vocab_size) * 3).bfloat16()
    params = SamplingParams(**{"temperature": 0.7} | SETTINGS[setting])
    tasks = [
        (
            line,
            SampleTask(
                params,
                line,
                2200,
                array("q", chosen.choices(range(vocab_size), k=2000)),
                chosen.choices(range(vocab_size), k=200),
            ),
        )
        for line in range(num_rows)
    ]
    times: dict[str, list[float]] = {"C": [], "torch": []}
    for _ in range(repeats):
        for name, seconds in times.items():
            with patch.object(sampler, "cpu_kernels", cpu_kernels if name == "C" else lambda: None):
                started = time.perf_counter()
                sampler.sample(logits, tasks)
                seconds.append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds[1:]) * 1000 for name, seconds in times.items()}
    return {
        "vocabulary": vocab_size,
        "setting": setting,
        **{f"{name} ms": round(median, 2) for name, median in medians.items()},
        "times": round(medians["torch"] / medians["C"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [
            row(vocab_size, setting, arguments.rows, arguments.repeats)
            for vocab_size in VOCABULARIES
            for setting in SETTINGS
        ]
    print_table(f"choosing {arguments.rows} tokens, {arguments.threads} threads", rows)
    if arguments.save:
        print(save("sampling", rows))


if __name__ == "__main__":
    main()
