"""Transfers under random schedules of everything that can go wrong; see world.py.

    pytest tests/simulation                                          5,000 schedules
    pytest tests/simulation --schedules 1000000                      more, in batches of 20,000
    pytest tests/simulation --hypothesis-seed 123                    the same ones again
    python -m tests.simulation 00c3...                               one that failed, told in full
    python -m tests.simulation --count 20000                         how often what happens

A schedule is a string of bytes, each of which decides one thing; hypothesis draws them, and shrinks one that
fails.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.simulation.push import Way
from tests.simulation.schedule import NUM_BYTES, Chaos, Fault
from tests.simulation.search import random_schedules, replay, report
from tests.simulation.world import World

BATCH = 20_000  # hypothesis remembers every example of a run

# What a batch does not miss: a simulator that nothing happens in finds nothing.
HAPPENS = {
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
    "attempt on one worker",
    "commit before its pages",
    "export inside a step",
    "fenced writer",
    "pages found in decode's prefix cache",
    "preemption",
    "refused beside: checksum",
    "retry",
    "stale beside: epoch",
    "transfer between blocks of two sizes",
    "withdraw",
}

_SETTINGS = settings(
    database=None,  # the seed alone decides
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _few_collections() -> Iterator[None]:
    """The worlds are cycles; what was there before them need not be looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_nothing_goes_wrong_whatever_goes_wrong(
    num_schedules: int, seed: int, say: Callable[[str], None]
) -> None:
    started = time.perf_counter()
    count: Counter[str] = Counter()
    for first in range(0, num_schedules, BATCH):
        _search(seed + first // BATCH, min(BATCH, num_schedules - first), count)
    seconds = time.perf_counter() - started
    say(
        f"simulation: {num_schedules} schedules, {count['events']} events in {seconds:.0f} s; "
        f"--hypothesis-seed={seed}"
    )
    if num_schedules >= BATCH:
        assert not HAPPENS - count.keys()


def test_a_schedule_happens_the_same_way_each_time() -> None:
    for decisions in random_schedules(1, 50):
        trace, error = replay(decisions)
        assert error is None
        assert trace
        assert replay(decisions) == (trace, None)


def _search(seed: int, number: int, count: Counter[str]) -> None:
    failed: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(_SETTINGS, max_examples=number)
    @given(st.binary(min_size=NUM_BYTES, max_size=NUM_BYTES))
    def search(decisions: bytes) -> None:
        try:
            World(decisions, count).run()
        except Exception:
            failed.append(decisions)
            raise

    try:
        search()
    except Exception as error:
        if failed:  # the last one is the smallest
            error.add_note(report(failed[-1]))
        error.add_note(f"The whole search again:  pytest tests/simulation --hypothesis-seed={seed}")
        raise
