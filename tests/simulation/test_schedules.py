"""Transfers under random schedules of everything that can go wrong; see world.py.

    pytest tests/simulation                                   10,000 schedules
    pytest tests/simulation --schedules 1000000               more
    pytest tests/simulation --hypothesis-seed 123             the same ones again
    python -m tests.simulation 00c3...                        one that went wrong, told in full
    python -m tests.simulation --count 20000                  how often what happens

A schedule is a string of bytes, each of which decides one thing; hypothesis draws them, and shrinks one that
goes wrong.
"""

import time
from collections import Counter
from collections.abc import Callable

from tests.simulation.push import Way
from tests.simulation.schedule import Chaos, Fault
from tests.simulation.search import random_schedules, replay, search

BATCH = 10_000  # hypothesis remembers every example of a search

# What a search of BATCH does not miss: a simulator that nothing happens in finds nothing.
HAPPENS = {
    "copy outlasts an abort",
    *(f"message {fault.value}" for fault in Fault),
    *(f"chaos: {chaos.value}" for chaos in Chaos),
    *(f"transfer by {way.value}" for way in Way),
    *(
        f"corrupted {part}"
        for part in ("payload of pages", "head of pages", "head of commit", "head of open")
    ),
    *(
        f"refused: {reason}"
        for reason in ("checksum", "duplicate", "epoch", "frame", "incomplete", "layout", "state", "ticket")
    ),
    *(f"outcome: {outcome}" for outcome in ("committed", "aborted", "withdrawn", "deadline")),
    *(f"request {ending}" for ending in ("completed", "aborted", "failed: transfer", "failed: worker lost")),
    "answer goes on",
    "attempt on one worker",
    "commit before its pages",
    "export inside a step",
    "fenced writer",
    "pages found in decode's prefix cache",
    "preemption",
    "refused beside: checksum",
    "reservation waits for pages",
    "retry",
    "stale beside: epoch",
    "transfer between blocks of two sizes",
    "withdraw",
}


def test_no_schedule_goes_wrong(num_schedules: int, seed: int, say: Callable[[str], None]) -> None:
    started = time.perf_counter()
    again = f"pytest tests/simulation --schedules {num_schedules} --hypothesis-seed {seed}"
    batches = [min(BATCH, num_schedules - first) for first in range(0, num_schedules, BATCH)]
    count: Counter[str] = Counter()
    for index, number in enumerate(batches):
        found = search(seed + index, number)
        assert not found.report, f"{found.report}\nThe whole search again:  {again}"
        count += found.count
    seconds = time.perf_counter() - started
    say(f"{count['schedules']} schedules, {count['events']} events, {seconds:.0f} s:  {again}")
    if num_schedules >= BATCH:
        assert not HAPPENS - count.keys()


def test_a_schedule_happens_the_same_way_each_time() -> None:
    for decisions in random_schedules(1, 50):
        trace, error = replay(decisions)
        assert error is None
        assert trace
        assert replay(decisions) == (trace, None)
