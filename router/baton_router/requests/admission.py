"""The router's queue: requests wait here, in order, while the decode servers' batches are full."""

import asyncio
import logging
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import BatonError, Overloaded, Unavailable
from baton_router.requests.drain_rate import DrainRate

logger = logging.getLogger(__name__)

# Longer than anyone sensible waits for a first token, short enough that nothing waits for ever.
QUEUE_TIMEOUT_S = 600.0
# Prompts that wait, all together: about 36 bytes of memory a token. One alone may always wait.
MAX_QUEUED_TOKENS = 8 << 20
# Refusals come by the thousand.
_SECONDS_BETWEEN_WARNINGS = 10.0


@dataclass(eq=False, slots=True)
class _Waiter:
    order: tuple[int, int]  # priority, arrival
    num_slots: int
    num_tokens: int
    admitted: asyncio.Future[None]


class Admission:
    """Lets requests in while the workers have places, keeps a bounded number waiting, refuses the rest."""

    def __init__(
        self, max_queue: int, capacity: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_queue = max_queue
        self._capacity = capacity  # places of all connected decode servers; 0: no workers
        self._clock = clock
        self._num_slots_taken = 0
        self._waiters: list[_Waiter] = []
        self._num_queued_tokens = 0
        self._num_arrivals = 0
        self._drain_rate = DrainRate()
        self._next_warning_s = 0.0
        self._closed: BatonError | None = None
        self.num_refused = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiters)

    async def enter(self, num_slots: int, priority: int, num_tokens: int) -> None:
        """Take `num_slots` places; the caller gives them back with `leave`. `num_tokens`: of the prompt.

        Raises Overloaded when the queue is full, or no place came in time; Unavailable when the workers
        went away meanwhile.
        """
        if self._closed is not None:
            raise self._closed
        if not self._waiters and self._fits(num_slots, self._capacity()):
            self._num_slots_taken += num_slots
            return
        if not self._has_room(num_tokens):
            raise self._refusal()
        self._num_arrivals += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter((priority, self._num_arrivals), num_slots, num_tokens, future)
        insort(self._waiters, waiter, key=lambda queued: queued.order)
        self._num_queued_tokens += num_tokens
        await self._wait(waiter)

    def leave(self, num_slots: int) -> None:
        """Give places back."""
        self._num_slots_taken -= num_slots
        self.update()

    def close(self, error: BatonError) -> None:
        """Let nobody in any more: who waits, and who comes, gets the error."""
        self._closed = error
        self._num_queued_tokens = 0
        for waiter in self._waiters:
            if not waiter.admitted.done():
                waiter.admitted.set_exception(error)
        self._waiters.clear()

    def update(self) -> None:
        """Let in whom there is room for now; call it when the capacity changed."""
        if not self._waiters:
            return
        capacity = self._capacity()
        while self._waiters and (capacity == 0 or self._fits(self._waiters[0].num_slots, capacity)):
            waiter = self._waiters.pop(0)
            self._num_queued_tokens -= waiter.num_tokens
            if waiter.admitted.done():  # cancelled in this instant
                continue
            if capacity == 0:
                waiter.admitted.set_exception(Unavailable("The workers went away. Try again later."))
            else:
                self._num_slots_taken += waiter.num_slots
                self._drain_rate.note(self._clock())
                waiter.admitted.set_result(None)

    async def _wait(self, waiter: _Waiter) -> None:
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT_S):
                await waiter.admitted
        except BaseException as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._num_queued_tokens -= waiter.num_tokens
                self.update()
            elif (
                waiter.admitted.done() and not waiter.admitted.cancelled() and not waiter.admitted.exception()
            ):
                self.leave(waiter.num_slots)  # let in and cancelled in the same instant
            if isinstance(error, TimeoutError):
                self.num_refused += 1
                raise Overloaded(f"No worker had room within {QUEUE_TIMEOUT_S:.0f} s.") from None
            raise

    def _has_room(self, num_tokens: int) -> bool:
        """Whether one more may wait."""
        fits = not self._waiters or self._num_queued_tokens + num_tokens <= MAX_QUEUED_TOKENS
        return fits and len(self._waiters) < self._max_queue

    def _refusal(self) -> Overloaded:
        """What one that finds the queue full is told; some of them go to the log."""
        self.num_refused += 1
        now, num_waiting = self._clock(), len(self._waiters)
        if now >= self._next_warning_s:
            self._next_warning_s = now + _SECONDS_BETWEEN_WARNINGS
            logger.warning(
                "the queue is full: %d requests wait (--max-queue %d) with %d tokens; %d were refused so far",
                num_waiting, self._max_queue, self._num_queued_tokens, self.num_refused,
            )  # fmt: skip
        return Overloaded(
            f"The queue is full: {num_waiting} requests wait. Try again later.",
            retry_after_s=self._drain_rate.seconds_for(num_waiting, now),
        )

    def _fits(self, num_slots: int, capacity: int) -> bool:
        """A request with more choices than all places together goes alone; a worker says what is wrong."""
        return capacity > 0 and self._num_slots_taken + min(num_slots, capacity) <= capacity
