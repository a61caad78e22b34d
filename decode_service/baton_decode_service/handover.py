"""From a reservation to a running request, on a decode server: what is told to whom, and when.

Pure: no I/O, no clock. The service gives it time and carries its effects out; the simulator in
`tests/simulation` does the same in virtual time.
"""

from typing import Protocol

from baton.core.commands import (
    AbortRequest,
    AddRequest,
    CommitRequest,
    EngineCommand,
    FailureReason,
    ReserveBlocks,
)
from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.request import BlocksReserved, EngineRequest, TokenEvent
from baton.core.reservation import Reservation, ReservationTable, TransferDeadlines
from baton.core.transfer_stats import TransferStats
from baton_kv_transfer.pages.arrived import PageWriter
from baton_kv_transfer.transfers.inbound import InboundTransfers

_LOCAL = "local"  # the transport of pages that change owner and not place


class Effects(Protocol):
    """What the handover asks of the world around it."""

    def submit(self, command: EngineCommand) -> None:
        """Give the engine a command."""
        ...

    def issue(self, reservation: Reservation) -> None:
        """Send the request's router a ticket."""
        ...

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the request's router that this worker gives it up."""
        ...

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        ...

    def new_transfer_id(self) -> bytes:
        """Bytes that nobody can guess."""
        ...

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        ...

    def deadlines_changed(self) -> None:
        """`next_deadline` may be sooner than it was."""
        ...


class DecodeHandover:
    """The requests of one decode server from `reserve` or `run_here` to their last token."""

    def __init__(
        self,
        epoch: int,
        store: PageStore,
        deadlines: TransferDeadlines,
        stats: TransferStats,
        effects: Effects,
        pages: PageWriter | None = None,
    ) -> None:
        """`pages` writes the store's pages; None: they are host memory."""
        self._layout: KVLayout = store.layout
        self._deadlines = deadlines
        self._stats = stats
        self._effects = effects
        self.table = ReservationTable(epoch)
        self.inbound = InboundTransfers(self.table, store, self, stats, pages)
        self._num_tokens: dict[str, int] = {}  # whose KV is to come, of requests that wait for pages
        self._open_choices: dict[str, set[int]] = {}  # of requests that decode
        self._cut_choices: dict[str, set[int]] = {}  # aborted while the request's pages are on their way

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> None:
        """Ask the engine for pages; `reserved` has its answer."""
        self._num_tokens[request.request_id] = request.num_tokens
        self._effects.submit(ReserveBlocks(request))

    def run_here(self, request: EngineRequest) -> None:
        """Compute the prompt on this engine and go on: its pages stay where they are."""
        self._open_choices[request.request_id] = set(range(request.sampling.n))
        self._stats.transports[_LOCAL].num_transfers += 1
        self._effects.submit(AddRequest(request))

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request, or one choice of it; pages under a transfer wait for its writer to let go."""
        if choice is not None:
            if request_id in self._open_choices:
                self._effects.submit(AbortRequest(request_id, choice))
                self._close_choice(request_id, choice)
            else:
                self._cut_choices.setdefault(request_id, set()).add(choice)
            return
        self._forget(request_id)
        reservation = self.table.of_request(request_id)
        if reservation is None:
            self._effects.submit(AbortRequest(request_id))
            return
        reservation.abort(self._effects.now())
        self.inbound.aborted(reservation)
        self._settle(reservation)

    # --- from the engine ----------------------------------------------------------------------------

    def reserved(self, reserved: BlocksReserved) -> None:
        """The engine has taken pages: issue a ticket for those that the prefix cache did not hold."""
        num_tokens = self._num_tokens.pop(reserved.request_id, None)
        if num_tokens is None:
            return  # aborted meanwhile; the engine has been told, and takes the pages back
        layout = self._layout
        reservation = Reservation(
            self._effects.new_transfer_id(),
            reserved.request_id,
            block_table=reserved.block_table[: layout.blocks_for(num_tokens)],
            first_block=reserved.num_cached_blocks,
            num_tokens=num_tokens,
            heads=layout.heads,
            deadlines=self._deadlines,
            now=self._effects.now(),
        )
        self._stats.delta_bytes_saved += reserved.num_cached_blocks * layout.bytes_per_block
        self.table.add(reservation)
        self._effects.deadlines_changed()
        self._effects.issue(reservation)

    def token(self, event: TokenEvent) -> None:
        """A token was sampled."""
        if event.finish_reason is not None:
            self._close_choice(event.request_id, event.choice)

    def failed(self, request_id: str, reason: FailureReason, message: str) -> None:
        """The engine gave a request up."""
        if request_id in self._num_tokens or request_id in self._open_choices:
            self._forget(request_id)
            self._effects.fail(request_id, reason, message)

    # --- from transfers (baton_kv_transfer.transfers.inbound.TransferOwner) ---------------------------

    def deadline_changed(self, reservation: Reservation) -> None:
        """The writer's deadline may be sooner than the one before."""
        self._effects.deadlines_changed()

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """The pages pass to the engine."""
        cut = self._cut_choices.pop(request_id, set())
        wanted = {choice: token for choice, token in first_tokens.items() if choice not in cut}
        if not wanted:
            self._effects.submit(AbortRequest(request_id))
            self._effects.forget(request_id)
            return
        self._open_choices[request_id] = set(wanted)
        self._effects.submit(CommitRequest(request_id, wanted))

    def withdrawn(self, reservation: Reservation) -> None:
        """Prefill's first tokens ended the request: give the pages back, nothing failed."""
        self._settle(reservation, outcome="withdrawn")

    def writer_gone(self, reservation: Reservation) -> None:
        """A call of the transfer has ended.

        Why, the router learns from prefill, whose call it was, or from the loss of prefill itself: a report
        from here would race theirs, and knows less.
        """
        self._settle(reservation)

    # --- deadlines ----------------------------------------------------------------------------------

    def expire(self) -> None:
        """End what has missed its deadline."""
        for reservation in self.table.expire(self._effects.now()):
            self._stats.outcomes["deadline"] += 1
            message = "The KV transfer missed its deadline."
            self._effects.fail(reservation.request_id, FailureReason.TRANSFER, message)
            self.inbound.aborted(reservation)
            self._settle(reservation)
        self._effects.deadlines_changed()

    # --- ends ---------------------------------------------------------------------------------------

    def _settle(self, reservation: Reservation, outcome: str = "aborted") -> None:
        """Give the pages back once nobody writes them; until then the deadline watches the writer."""
        if not reservation.is_over:
            self._effects.deadlines_changed()
            return
        self.table.remove(reservation)
        self._stats.outcomes[outcome] += 1
        self._forget(reservation.request_id)
        self._effects.forget(reservation.request_id)
        self._effects.submit(AbortRequest(reservation.request_id))

    def _close_choice(self, request_id: str, choice: int) -> None:
        open_choices = self._open_choices.get(request_id)
        if open_choices is None:
            return
        open_choices.discard(choice)
        if not open_choices:
            del self._open_choices[request_id]
            self._effects.forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._num_tokens.pop(request_id, None)
        self._open_choices.pop(request_id, None)
        self._cut_choices.pop(request_id, None)
