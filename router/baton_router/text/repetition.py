"""Finds an answer that has begun to say the same thing over and over, token by token."""

from collections import deque
from dataclasses import dataclass

from baton.core.errors import InvalidRequest

FIELD = "repetition_detection"
MAX_PATTERN_SIZE = 1024  # a token costs at most a step for each size


@dataclass(frozen=True, slots=True)
class Repetition:
    """What counts as one: `min_count` times in a row a pattern of `min_pattern_size` to `max_pattern_size`
    tokens. A `max_pattern_size` of 0 finds none. The same as vLLM's RepetitionDetectionParams.

    Raises InvalidRequest where the numbers don't go together.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0  # 0 is 1
    min_count: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN_SIZE:
            raise _invalid(
                "max_pattern_size",
                f"{FIELD} needs 0 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN_SIZE}, but has "
                f"{self.min_pattern_size} and {self.max_pattern_size}.",
            )
        if self.max_pattern_size and self.min_count < 2:
            raise _invalid("min_count", f"{FIELD}.min_count must be at least 2, but is {self.min_count}.")


class RepetitionDetector:
    """Follows the tokens of one choice."""

    def __init__(self, repetition: Repetition) -> None:
        self._sizes = (max(1, repetition.min_pattern_size), repetition.max_pattern_size)
        self._num_followers = repetition.min_count - 1  # of a pattern's first time
        self._positions: dict[int, deque[int]] = {}  # where each token stood, as far back as a pattern goes
        self._runs: dict[int, int] = {}  # by size: how many tokens, up to the last, equal those so far before
        self._num_tokens = 0

    def push(self, token_id: int) -> bool:
        """Whether the answer ends in a repetition with this token."""
        smallest, largest = self._sizes
        positions = self._positions.setdefault(token_id, deque())
        now = self._num_tokens
        while positions and now - positions[0] > largest:
            positions.popleft()
        sizes = [now - position for position in positions if now - position >= smallest]
        self._runs = {size: self._runs.get(size, 0) + 1 for size in sizes}
        positions.append(now)
        self._num_tokens += 1
        return any(run >= size * self._num_followers for size, run in self._runs.items())


def _invalid(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=f"{FIELD}.{field}", code="out_of_range")
