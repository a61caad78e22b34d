"""How fast pages may arrive on the cores that a decode server computes on. Pure: no I/O, no clock."""

from collections.abc import Callable

# What may come at once: a chunk of a prompt, whose request somebody waits for.
BURST_BYTES = 16 << 20
# Beyond that, for each core. Bytes that arrive cost a core 1 to 2 s per GB, here and in the kernel, which the
# steps of running requests then lack; docs/kv-transfer.md has what was measured.
BYTES_PER_CORE_SECOND = 50e6


class InboundPace:
    """Lets pages come as fast as they can while nobody else is served, and steadily else.

    The generic cell rate algorithm (ITU-T I.371, annex A), with bytes for cells.
    """

    def __init__(self, is_serving: Callable[[], bool], num_cores: int) -> None:
        """`is_serving`: whether requests are running whose tokens would come later."""
        self._is_serving = is_serving
        self._bytes_per_second = num_cores * BYTES_PER_CORE_SECOND
        self._burst_s = BURST_BYTES / self._bytes_per_second
        self._due = 0.0  # when all that has come would have come at the steady rate

    def delay_s(self, num_bytes: int, now: float) -> float:
        """Seconds to wait before pages of `num_bytes` are taken. They count as taken."""
        if not self._is_serving():
            self._due = now
            return 0.0
        due = max(self._due, now)
        self._due = due + num_bytes / self._bytes_per_second
        return max(0.0, self._due - self._burst_s - now)
