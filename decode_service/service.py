"""A decode server: reserves pages, receives KV into them, and runs continuous batching from there."""

import asyncio
import secrets
import time

from baton.config import WorkerConfig
from baton.core.commands import (
    AbortRequest,
    CommitRequest,
    EngineOutput,
    FailureReason,
    ReserveBlocks,
)
from baton.core.errors import InvalidRequest
from baton.core.request import BlocksReserved, EngineRequest, TokenEvent
from baton.core.reservation import Reservation, ReservationTable, TransferDeadlines
from baton.engine.host import EngineHost
from baton.rpc import codec
from baton.rpc.sessions import SessionHost
from baton.rpc.ticket import Ticket
from baton.rpc.worker_server import make_session_host, new_epoch
from baton.v1 import transfer_pb2, worker_pb2
from kv_transfer.grpc_receiver import GrpcReceiver
from kv_transfer.stats import TransferStats

_TRANSFER_ID_BYTES = 16
_DEADLINES = TransferDeadlines()


class DecodeService:
    """Joins sessions, reservations, transfers and the engine; all of it on the event loop's thread."""

    def __init__(
        self, config: WorkerConfig, engine: EngineHost, deadlines: TransferDeadlines = _DEADLINES
    ) -> None:
        self._engine = engine
        self._address = config.advertise_address
        self._layout = engine.store.layout
        self._deadlines = deadlines
        self._epoch = new_epoch()
        self._table = ReservationTable(self._epoch)
        self._stats = TransferStats()
        self._num_prompt_tokens: dict[str, int] = {}  # of requests that wait for pages
        self._open_choices: dict[str, set[int]] = {}  # of requests that decode
        self._cut_choices: dict[str, set[int]] = {}  # aborted while the request's pages are on their way
        self._timer: asyncio.TimerHandle | None = None
        self.receiver = GrpcReceiver(self._table, engine.store, self, time.monotonic, self._stats)
        self.sessions: SessionHost = make_session_host(
            config, self._epoch, engine.scheduler_config, self._layout, engine.fingerprint, self._load
        )
        self.sessions.handler = self

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> None:
        """Ask the engine for pages; `on_output` answers with a ticket."""
        self._num_prompt_tokens[request.request_id] = len(request.prompt_token_ids)
        self._engine.submit(ReserveBlocks(request))

    def prefill(
        self, request: EngineRequest, ticket: transfer_pb2.Ticket | None, first_tokens: dict[int, int]
    ) -> None:
        """Not this server's work."""
        raise InvalidRequest("this is a decode server: send prompts to a prefill server")

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request, or one choice of it; pages under a transfer wait for its writer to let go."""
        if choice is not None:
            if request_id in self._open_choices:
                self._engine.submit(AbortRequest(request_id, choice))
                self._close_choice(request_id, choice)
            else:
                self._cut_choices.setdefault(request_id, set()).add(choice)
            return
        self._forget(request_id)
        reservation = self._table.of_request(request_id)
        if reservation is None:
            self._engine.submit(AbortRequest(request_id))
            return
        reservation.abort(time.monotonic())
        self._settle(reservation)

    # --- from the engine ----------------------------------------------------------------------------

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        for reserved in output.reserved:
            self._issue_ticket(reserved)
        self.sessions.send_step(output, self._load())
        for event in output.tokens:
            self._note_token(event)
        for failure in output.failures:
            self._forget(failure.request_id)
            self.sessions.fail(failure.request_id, failure.reason, failure.message)

    def _issue_ticket(self, reserved: BlocksReserved) -> None:
        num_prompt_tokens = self._num_prompt_tokens.pop(reserved.request_id, None)
        if num_prompt_tokens is None:
            return  # aborted meanwhile; the engine has been told, and takes the pages back
        num_blocks = self._layout.blocks_for(num_prompt_tokens)
        reservation = Reservation(
            secrets.token_bytes(_TRANSFER_ID_BYTES),
            reserved.request_id,
            block_table=reserved.block_table[:num_blocks],
            first_block=reserved.num_cached_blocks,
            num_layers=self._layout.num_layers,
            deadlines=self._deadlines,
            now=time.monotonic(),
        )
        self._table.add(reservation)
        self._arm_timer()
        ticket = Ticket(
            transfer_id=reservation.transfer_id,
            epoch=self._epoch,
            request_id=reserved.request_id,
            address=self._address,
            first_block=reservation.first_block,
            num_blocks=num_blocks,
            layout=self._layout,
        )
        self.sessions.send(
            reserved.request_id,
            lambda number: worker_pb2.Event(
                reserved=worker_pb2.Reserved(number=number, ticket=codec.ticket_to_proto(ticket))
            ),
        )

    def _note_token(self, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            self._close_choice(event.request_id, event.choice)

    def _close_choice(self, request_id: str, choice: int) -> None:
        open_choices = self._open_choices.get(request_id)
        if open_choices is None:
            return
        open_choices.discard(choice)
        if not open_choices:
            del self._open_choices[request_id]
            self.sessions.forget(request_id)

    # --- from transfers (kv_transfer.grpc_receiver.TransferOwner) ------------------------------------

    def opened(self, reservation: Reservation) -> None:
        """The writer's deadline may be sooner than the one before."""
        self._arm_timer()

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """The pages pass to the engine."""
        cut = self._cut_choices.pop(request_id, set())
        wanted = {choice: token for choice, token in first_tokens.items() if choice not in cut}
        if not wanted:
            self._engine.submit(AbortRequest(request_id))
            self.sessions.forget(request_id)
            return
        self._open_choices[request_id] = set(wanted)
        self._engine.submit(CommitRequest(request_id, wanted))

    def withdrawn(self, reservation: Reservation) -> None:
        """Prefill's first tokens ended the request: give the pages back, nothing failed."""
        reservation.writer_gone(time.monotonic())
        self._settle(reservation, outcome="withdrawn")

    def writer_gone(self, reservation: Reservation) -> None:
        """The transfer's call ended without commit.

        Why, the router learns from prefill, whose call it was, or from the loss of prefill itself: a report
        from here would race theirs, and knows less.
        """
        reservation.writer_gone(time.monotonic())
        self._settle(reservation)

    def _settle(self, reservation: Reservation, outcome: str = "aborted") -> None:
        """Give the pages back once nobody writes them; until then the deadline watches the writer."""
        if not reservation.is_over:
            self._arm_timer()
            return
        self._table.remove(reservation)
        self._stats.outcomes[outcome] += 1
        self._forget(reservation.request_id)
        self.sessions.forget(reservation.request_id)
        self._engine.submit(AbortRequest(reservation.request_id))

    def _forget(self, request_id: str) -> None:
        self._num_prompt_tokens.pop(request_id, None)
        self._open_choices.pop(request_id, None)
        self._cut_choices.pop(request_id, None)

    # --- deadlines ----------------------------------------------------------------------------------

    def _arm_timer(self) -> None:
        deadline = self._table.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            delay = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        for reservation in self._table.expire(time.monotonic()):
            self._stats.outcomes["deadline"] += 1
            self.sessions.fail(
                reservation.request_id, FailureReason.TRANSFER, "The KV transfer missed its deadline."
            )
            self._settle(reservation)
        self._arm_timer()

    def _load(self) -> worker_pb2.Load:
        return codec.load_to_proto(self._engine.load, self._stats.num_bytes, self._stats.outcomes)
