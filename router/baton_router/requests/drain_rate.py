"""How fast the queue empties, for clients that are to come back."""

from collections import deque

_NUM_SEEN = 64
MAX_RETRY_AFTER_S = 60


class DrainRate:
    """Of the last requests that left the queue; times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._left_at: deque[float] = deque(maxlen=_NUM_SEEN)

    def note(self, now: float) -> None:
        """A request has left the queue."""
        self._left_at.append(now)

    def seconds_for(self, num_waiting: int, now: float) -> int:
        """When those that wait will have left, as whole seconds from 1 to MAX_RETRY_AFTER_S."""
        if len(self._left_at) < 2:
            return 1
        seconds_each = (now - self._left_at[0]) / len(self._left_at)
        return max(1, min(MAX_RETRY_AFTER_S, round(num_waiting * seconds_each)))
