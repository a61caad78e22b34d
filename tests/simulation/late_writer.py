"""Decode's pages as those of a device, in virtual time."""

from collections import Counter
from typing import TYPE_CHECKING

from baton.core.reservation import Reservation, TransferDeadlines, TransferState
from baton_kv_transfer.pages.arrived import Arrived, WhenWritten
from tests.simulation.pages import DecodePages
from tests.simulation.schedule import Violation

if TYPE_CHECKING:
    from tests.simulation.world import World

DEADLINES = TransferDeadlines()


class LateWriter:
    """Implements baton_kv_transfer.pages.arrived.PageWriter: copies take a while, whatever happens."""

    def __init__(self, world: "World", pages: DecodePages, write_time: float) -> None:
        self._world = world
        self.is_dead = False
        self._pages = pages
        self._write_time = write_time
        self._under_way: Counter[str] = Counter()  # by request
        # The peer's abort does not end a copy of this server's own.
        pages.written_in.add(TransferState.ABORTING)

    @property
    def longest_s(self) -> float:
        """How much later than by its deadline alone an aborted reservation may drain."""
        return self._write_time + DEADLINES.aborting_s

    def write(self, arrived: Arrived, when_written: WhenWritten) -> None:
        """See PageWriter."""
        reservation = self._pages.at_work
        assert reservation is not None
        self._under_way[reservation.request_id] += 1
        self._world.after(self._write_time, self._finish, arrived, when_written, reservation)

    async def room(self) -> None:
        """See PageWriter."""

    def require_idle(self, request_id: str) -> None:
        """The request's pages pass to somebody else."""
        if self._under_way[request_id]:
            raise Violation(f"the pages of {request_id} pass on while a copy into them is under way")

    def _finish(self, arrived: Arrived, when_written: WhenWritten, reservation: Reservation) -> None:
        if self.is_dead:
            return
        if reservation.state is TransferState.ABORTING:
            self._world.count["copy outlasts an abort"] += 1
        pages = self._pages
        pages.at_work = reservation
        try:
            place, tokens = arrived.place, (arrived.first_token, arrived.num_tokens)
            arrived.converter.write(pages, arrived.block_table, *tokens, place, arrived.payload)
        finally:
            pages.at_work = None
        self._under_way[reservation.request_id] -= 1
        when_written(None)
