"""Searches among schedules for one that goes wrong, and says what there is to know of it."""

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.simulation.schedule import NUM_BYTES
from tests.simulation.world import World

# An example of hypothesis costs as much as half a schedule.
PER_EXAMPLE = 8

_SETTINGS = settings(
    database=None,  # the seed alone decides
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a search."""

    count: Counter[str]  # how often what happened
    report: str  # of the smallest schedule that goes wrong; empty where none does


def search(seed: int, number: int) -> Found:
    """Try schedules that hypothesis draws, and shrink one that goes wrong."""
    count: Counter[str] = Counter()
    failed: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(_SETTINGS, max_examples=-(-number // PER_EXAMPLE))
    @given(st.binary(min_size=PER_EXAMPLE * NUM_BYTES, max_size=PER_EXAMPLE * NUM_BYTES))
    def try_some(drawn: bytes) -> None:
        for start in range(0, len(drawn), NUM_BYTES):
            decisions = drawn[start : start + NUM_BYTES]
            try:
                World(decisions, count).run()
                count["schedules"] += 1
            except Exception:
                failed.append(decisions)
                raise

    gc.collect()
    gc.freeze()  # worlds are cycles; what was there before them need not be looked at again and again
    try:
        try_some()
    except Exception:
        if not failed:
            raise
        return Found(count, report(failed[-1]))  # the last one is the smallest
    finally:
        gc.unfreeze()
    return Found(count, "")


def random_schedules(seed: int, number: int) -> Iterator[bytes]:
    """Schedules without hypothesis: faster, but nobody shrinks them."""
    random = Random(seed)
    for _ in range(number):
        yield random.randbytes(NUM_BYTES)


def first_failure(seed: int, number: int) -> Exception | None:
    """How the first of some random schedules goes wrong; None where none does."""
    for decisions in random_schedules(seed, number):
        try:
            World(decisions, Counter()).run()
        except Exception as error:
            return error
    return None


def replay(decisions: bytes) -> tuple[list[str], Exception | None]:
    """Run one schedule again: all that happens, and how it goes wrong, if it does."""
    trace: list[str] = []
    try:
        World(decisions, Counter(), trace).run()
    except Exception as error:
        return trace, error
    return trace, None


def report(decisions: bytes) -> str:
    """A schedule that goes wrong: all that happens, and how to see it again."""
    trace, error = replay(decisions)
    return "\n".join(
        (
            "What happens, in virtual seconds:",
            *trace,
            f"{type(error).__name__}: {error}",
            f"This schedule again:  python -m tests.simulation {decisions.rstrip(bytes(1)).hex() or '00'}",
        )
    )
