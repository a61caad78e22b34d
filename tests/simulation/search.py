"""Runs schedules, and says what there is to know of one that fails."""

from collections import Counter
from collections.abc import Iterator
from random import Random

from tests.simulation.schedule import NUM_BYTES
from tests.simulation.world import World


def random_schedules(seed: int, number: int) -> Iterator[bytes]:
    """Schedules without hypothesis: faster, but nobody shrinks them."""
    random = Random(seed)
    for _ in range(number):
        yield random.randbytes(NUM_BYTES)


def first_failure(seed: int, number: int) -> Exception | None:
    """How the first of some random schedules fails; None where none does."""
    for decisions in random_schedules(seed, number):
        try:
            World(decisions, Counter()).run()
        except Exception as error:
            return error
    return None


def replay(decisions: bytes) -> tuple[list[str], Exception | None]:
    """Run one schedule again: all that happened, and how it failed, if it did."""
    trace: list[str] = []
    try:
        World(decisions, Counter(), trace).run()
    except Exception as error:
        return trace, error
    return trace, None


def report(decisions: bytes) -> str:
    """A schedule that failed: all that happened, and how to see it again."""
    trace, error = replay(decisions)
    decisions = decisions.rstrip(b"\0")
    return "\n".join(
        (
            "What happened, in virtual seconds:",
            *trace,
            f"{type(error).__name__}: {error}",
            f"This schedule again:  python -m tests.simulation {decisions.hex() or '00'}",
        )
    )
