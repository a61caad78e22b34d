"""What this machine can do at best: the floor that steps of an engine are measured against.

    python -m bench.limits [--threads 1 2] [--save]

Reading speed is that of summing 512 MiB, the best of several passes; multiplication is that of two matrices
of 2,048 x 2,048 in torch, in float32 and in bfloat16 (which CPUs without AVX512-BF16 or AMX emulate).
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.report import print_table, save

READ_BYTES = 512 << 20
MATRIX = 2048
PASSES = 5


def best_seconds(work: Callable[[], object]) -> float:
    """The fastest of several passes, after one that warms up: a limit is what nothing disturbed."""
    seconds = []
    for _ in range(PASSES + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def read_gigabytes_per_second() -> float:
    """Reading memory that no cache holds."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / best_seconds(numbers.sum) / 1e9


def gigaflops(dtype: torch.dtype) -> float:
    """Multiplying square matrices."""
    left, right = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2 * MATRIX**3 / best_seconds(lambda: left @ right) / 1e9


def measure(num_threads: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(num_threads)
    return {
        "threads": num_threads,
        "read GB/s": round(read_gigabytes_per_second(), 1),
        "float32 GFLOP/s": round(gigaflops(torch.float32), 1),
        "bfloat16 GFLOP/s": round(gigaflops(torch.bfloat16), 1),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/")
    arguments = parser.parse_args()
    rows = [measure(num_threads) for num_threads in arguments.threads]
    print_table("Limits", rows)
    if arguments.save:
        print(save("limits", rows))


if __name__ == "__main__":
    main()
