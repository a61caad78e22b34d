"""Bytes that decide: what happens in one schedule, and when."""

from collections.abc import Callable
from enum import Enum
from functools import cache
from itertools import chain, repeat

NUM_BYTES = 64  # of a schedule; one that needs more goes on tamely


class Violation(AssertionError):
    """Something happened that must never happen."""


class Fault(Enum):
    """What goes wrong with one message of a transfer."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    OVERTAKEN = "overtaken"  # by those that were sent after it
    CORRUPTED = "corrupted"  # one bit of it
    STALLED = "stalled"  # for less than any deadline
    HELD_UP = "held up"  # for longer than some deadlines, or all
    CUT = "cut"  # its call breaks
    ECHOED = "echoed"  # all messages of its call so far come once more, later, as a call of their own


class Chaos(Enum):
    """What goes wrong beside messages."""

    NOTHING = "nothing"
    ABORT = "abort"
    ABORT_CHOICE = "abort of a choice"
    RESTART_DECODE = "restart of decode"
    RESTART_PREFILL = "restart of prefill"
    CUT_DECODE_SESSION = "cut of decode's session"
    CUT_PREFILL_SESSION = "cut of prefill's session"
    CUT_CALL = "cut of a call"
    PAUSE_WRITER = "pause of a writer"
    LAG_RECEIVER = "lag of the receiver"
    FAIL_PREFILL_STEP = "failed step on prefill"
    FAIL_DECODE_STEP = "failed step on decode"
    ECHO = "echo of a call"


# By three bits; zero is the tame choice everywhere.
HOPS = (0.001, 0.0004, 0.002, 0.001, 0.004, 0.008, 0.02, 0.07)
WRITES = (0.0, 0.0, 0.0005, 0.0, 0.001, 0.0, 0.003, 0.0)
# By two bits. Deadlines: 5 s, 30 s, 120 s, 600 s.
STALLS = (0.3, 2.9, 4.6, 25.0)
WRITE_TIMES = (0.0005, 0.004, 0.3, 6.5)
LONG_STALLS = (31.0, 100.0, 125.0, 650.0)

_CHAOS = (*Chaos, Chaos.ABORT, Chaos.ABORT_CHOICE, Chaos.LAG_RECEIVER)


class Schedule:
    """Takes one byte for each decision; when all are used up, zeros."""

    def __init__(self, decisions: bytes) -> None:
        self.byte: Callable[[], int] = chain(decisions, repeat(0)).__next__

    def hop(self) -> float:
        """How long a message takes, in seconds."""
        return HOPS[self.byte() & 7]

    def pick(self, *choices: int) -> int:
        """One of `choices`, the first being the tame one."""
        return choices[self.byte() % len(choices)]

    def faults(self) -> tuple[Fault | None, ...]:
        """By five bits of a message's byte: what befalls it. Few kinds in one schedule, in many none."""
        return _fault_table(self.byte() & self.byte())

    def chaos(self) -> tuple[int, Chaos, int]:
        """After how many events, what, and a number that says the rest."""
        when, what = self.byte() * 5 >> 4, self.byte()
        return when, _CHAOS[(what & 15) % len(_CHAOS)], what >> 4


@cache
def _fault_table(mask: int) -> tuple[Fault | None, ...]:
    enabled = [fault for bit, fault in enumerate(Fault) if mask >> bit & 1]
    fates: list[Fault | None] = [None] * 32
    for index, fault in enumerate(enabled):
        fates[31 - 2 * index] = fates[30 - 2 * index] = fault
    return tuple(fates)
