"""The router's queue: requests wait here, in order, while the decode servers' batches are full."""

import asyncio
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import Overloaded, Unavailable

# Longer than anyone sensible waits for a first token, short enough that nothing waits for ever.
QUEUE_TIMEOUT_S = 600.0


@dataclass(eq=False, slots=True)
class _Waiter:
    order: tuple[int, int]  # priority, arrival
    num_slots: int
    admitted: asyncio.Future[None]


class Admission:
    """Lets requests in while the workers have places, keeps a bounded number waiting, refuses the rest."""

    def __init__(self, max_queue: int, capacity: Callable[[], int]) -> None:
        self._max_queue = max_queue
        self._capacity = capacity  # places of all connected decode servers; 0: no workers
        self._num_slots_taken = 0
        self._waiters: list[_Waiter] = []
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiters)

    async def enter(self, num_slots: int, priority: int) -> None:
        """Take `num_slots` places; the caller gives them back with `leave`.

        Raises Overloaded when the queue is full, or no place came in time; Unavailable when the workers
        went away meanwhile.
        """
        if not self._waiters and self._fits(num_slots, self._capacity()):
            self._num_slots_taken += num_slots
            return
        if len(self._waiters) >= self._max_queue:
            raise Overloaded(f"The queue is full: {len(self._waiters)} requests wait. Try again later.")
        self._num_arrivals += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter((priority, self._num_arrivals), num_slots, future)
        insort(self._waiters, waiter, key=lambda queued: queued.order)
        await self._wait(waiter)

    def leave(self, num_slots: int) -> None:
        """Give places back."""
        self._num_slots_taken -= num_slots
        self.update()

    def update(self) -> None:
        """Let in whom there is room for now; call it when the capacity changed."""
        if not self._waiters:
            return
        capacity = self._capacity()
        while self._waiters and (capacity == 0 or self._fits(self._waiters[0].num_slots, capacity)):
            waiter = self._waiters.pop(0)
            if waiter.admitted.done():  # cancelled in this instant
                continue
            if capacity == 0:
                waiter.admitted.set_exception(Unavailable("The workers went away. Try again later."))
            else:
                self._num_slots_taken += waiter.num_slots
                waiter.admitted.set_result(None)

    async def _wait(self, waiter: _Waiter) -> None:
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT_S):
                await waiter.admitted
        except BaseException as error:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self.update()
            elif (
                waiter.admitted.done() and not waiter.admitted.cancelled() and not waiter.admitted.exception()
            ):
                self.leave(waiter.num_slots)  # let in and cancelled in the same instant
            if isinstance(error, TimeoutError):
                raise Overloaded(f"No worker had room within {QUEUE_TIMEOUT_S:.0f} s.") from None
            raise

    def _fits(self, num_slots: int, capacity: int) -> bool:
        """A request with more choices than all places together goes alone; a worker says what is wrong."""
        return capacity > 0 and self._num_slots_taken + min(num_slots, capacity) <= capacity
