"""Runs one schedule again and tells what happens, or many to count what happens in them.

python -m tests.simulation 00c3...      the bytes of one schedule, as a failed test prints them
python -m tests.simulation --count 20000 [--seed 1]
"""

import argparse
import time
from collections import Counter

from tests.simulation.search import random_schedules, replay
from tests.simulation.world import World


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("schedule", nargs="?", type=bytes.fromhex, default=b"")
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.count:
        _count(options.count, options.seed)
        return
    trace, error = replay(options.schedule)
    print("\n".join(trace))
    if error is not None:
        raise error
    print("Nothing is wrong with it.")


def _count(number: int, seed: int) -> None:
    count: Counter[str] = Counter()
    started = time.perf_counter()
    for decisions in random_schedules(seed, number):
        World(decisions, count).run()
    seconds = time.perf_counter() - started
    for what, times in sorted(count.items()):
        print(f"{times:10}  {what}")
    print(f"{number} schedules, {number / seconds:.0f} a second")


if __name__ == "__main__":
    main()
