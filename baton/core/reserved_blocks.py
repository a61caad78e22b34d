"""Pages taken for prompts whose KV is on its way from a prefill server, and the requests that want some."""

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.core.block_pool import BlockPool
from baton.core.errors import TransferRefused
from baton.core.request import BlocksReserved, EngineRequest, SequenceState


@dataclass(slots=True)
class Reservee:
    """One request's place: queued while `block_table` is empty, then granted."""

    request: EngineRequest
    arrival: int
    block_table: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first."""
        return (self.request.priority, self.arrival)


class ReservedBlocks:
    """Queue of reservations and the pages of those that were granted."""

    def __init__(self, pool: BlockPool, block_size: int, vocab_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._queue: list[Reservee] = []
        self._granted: dict[str, Reservee] = {}

    @property
    def num_queued(self) -> int:
        """Requests that wait for pages."""
        return len(self._queue)

    @property
    def num_granted(self) -> int:
        """Requests whose pages are waiting for their KV."""
        return len(self._granted)

    @property
    def num_slots(self) -> int:
        """Places in the batch that granted requests will take."""
        return sum(reservee.request.sampling.n for reservee in self._granted.values())

    def is_next(self, waiting: Sequence[SequenceState]) -> bool:
        """Whether the first that waits for pages comes before all these sequences, which wait for theirs.

        It comes after those that had pages once and have lost them.
        """
        if not self._queue:
            return False
        order = self._queue[0].order
        return all(order < sequence.order and not sequence.has_begun for sequence in waiting)

    def queue(self, request: EngineRequest, arrival: int) -> None:
        """Ask for pages; `grant_next` gives them in order."""
        insort(self._queue, Reservee(request, arrival), key=lambda reservee: reservee.order)

    def grant_next(self, num_slots: int) -> BlocksReserved | None:
        """Take pages for the first in the queue, if they and its places in the batch are free."""
        if not self._queue or self._queue[0].request.sampling.n > num_slots:
            return None
        reservee = self._queue[0]
        request = reservee.request
        cached = self._pool.find_prefix(request.block_hashes)
        # One token more than arrive: the first step on decode must not fail for want of a page.
        num_blocks = request.num_tokens // self._block_size + 1
        missing = num_blocks - len(cached)
        if missing + self._pool.num_free_among(cached) > self._pool.num_free:
            return None
        self._pool.acquire(cached)
        self._pool.count_lookup(request.num_tokens, len(cached) * self._block_size)
        reservee.block_table = (*cached, *self._pool.allocate(missing))
        self._granted[request.request_id] = self._queue.pop(0)
        return BlocksReserved(request.request_id, reservee.block_table, len(cached))

    def take(self, request_id: str, first_tokens: Mapping[int, int]) -> Reservee | None:
        """Hand a granted reservation's pages over to the batch, with the first token of each choice.

        None where there is none. Raises TransferRefused, and gives it up, where such choices or tokens can't
        be.
        """
        reservee = self._granted.pop(request_id, None)
        if reservee is None:
            return None
        num_choices = reservee.request.sampling.n
        if max(first_tokens) >= num_choices or max(first_tokens.values()) >= self._vocab_size:
            self._pool.release(reservee.block_table)
            raise TransferRefused(
                "commit",
                f"first tokens up to {max(first_tokens.values())} of choices up to {max(first_tokens)}, "
                f"where there are {self._vocab_size} token ids and {num_choices} choices",
            )
        return reservee

    def drop(self, request_id: str) -> None:
        """Give up a reservation, queued or granted."""
        self._queue = [reservee for reservee in self._queue if reservee.request.request_id != request_id]
        reservee = self._granted.pop(request_id, None)
        if reservee is not None:
            self._pool.release(reservee.block_table)
