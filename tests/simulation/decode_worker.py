"""A decode server in virtual time: what DecodeService does around the real handover and transfers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.core.commands import AbortRequest, CommitRequest, EngineCommand, EngineOutput, FailureReason
from baton.core.errors import TransferRefused
from baton.core.request import EngineRequest
from baton.core.reservation import FramePlace, Reservation, TransferDeadlines, TransferState
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton_decode_service.handover import DecodeHandover
from baton_kv_transfer.pages.frames import check
from baton_kv_transfer.transfers.inbound import Writer
from tests.simulation.engine import VirtualEngine
from tests.simulation.late_writer import LateWriter
from tests.simulation.pages import DecodePages
from tests.simulation.receiver import ServerCall
from tests.simulation.schedule import Violation
from tests.simulation.sessions import Session, SessionHost

if TYPE_CHECKING:
    from tests.simulation.world import World

DEADLINES = TransferDeadlines()

# Pages beside a call: transfer id, epoch, place, payload, checksum.
PagesMessage = tuple[bytes, int, FramePlace, memoryview, int]


@dataclass(slots=True)
class Record:
    """One reservation, as it is seen from outside."""

    reservation: Reservation
    state: TransferState
    since: float  # in this state
    touched: float  # when a frame was last accepted
    calls: list[ServerCall] = field(default_factory=list)  # that may still write
    is_tainted: bool = False  # a corrupted frame was taken for good
    commit_came: float | None = None
    latest: float = 0.0  # when it has to leave its state


class VirtualDecode:
    """One incarnation of the decode server."""

    def __init__(self, world: "World", epoch: int) -> None:
        self.pages = DecodePages(world.decode_block_size, world.num_decode_blocks)
        self.engine = VirtualEngine(
            world, "decode", self.pages, world.decode_budget, world.decode_step_time, self._on_output
        )
        self.stats = TransferStats()
        self._writer = None if world.write_time is None else LateWriter(world, self.pages, world.write_time)
        self.handover = DecodeHandover(epoch, self.pages, DEADLINES, self.stats, self, self._writer)
        self.reservations = self.handover.table._by_transfer
        self.sessions = SessionHost()
        self.is_dead = False
        self._world = world
        self._epoch = epoch
        self._timer = 0  # the newest; older ones are cancelled
        self._records: dict[str, Record] = {}
        self._num_transfers = 0

    def die(self) -> None:
        """All state is lost."""
        if self._writer is not None:
            self._writer.is_dead = True
        self.is_dead = self.engine.is_dead = True

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, session: Session, request: EngineRequest) -> None:
        """See SessionHost."""
        self.sessions.begin(request.request_id, session)
        self.handover.reserve(request)

    def run_here(self, session: Session, request: EngineRequest) -> None:
        """See SessionHost."""
        self.sessions.begin(request.request_id, session)
        self.handover.run_here(request)

    def abort(self, session: Session, request_id: str, choice: int | None) -> None:
        """See SessionHost."""
        if self.sessions.requests.get(request_id) is not session:
            return
        self._world.log(f"decode: abort of {request_id}{'' if choice is None else f', choice {choice}'}")
        if choice is None:
            self.sessions.forget(request_id)
        self.handover.abort(request_id, choice)

    def session_ended(self, session: Session) -> None:
        """See SessionHost."""
        for request_id in self.sessions.orphans_of(session):
            self.sessions.forget(request_id)
            self.handover.abort(request_id, None)

    # --- from the engine ----------------------------------------------------------------------------

    def _on_output(self, output: EngineOutput) -> None:
        for reserved in output.reserved:
            self.handover.reserved(reserved)
        self._world.send_tokens(self.sessions, output.tokens)
        for event in output.tokens:
            self.handover.token(event)
        for failure in output.failures:
            self.handover.failed(failure.request_id, failure.reason, failure.message)

    # --- effects of the handover ----------------------------------------------------------------------

    def submit(self, command: EngineCommand) -> None:
        """Check who lets go of which pages, then give the engine the command."""
        if self._writer is not None and isinstance(command, AbortRequest | CommitRequest):
            self._writer.require_idle(command.request_id)
        match command:
            case AbortRequest(request_id, None):
                self._require_no_writer(request_id)
            case CommitRequest(request_id, _):
                self._pass_pages_to_engine(request_id)
        self.engine.submit(command)

    def issue(self, reservation: Reservation) -> None:
        """Send the request's router a ticket."""
        now = self._world.now
        request_id = reservation.request_id
        record = self._records[request_id] = Record(reservation, reservation.state, now, now)
        record.latest = self._latest(record)
        ticket = Ticket(
            transfer_id=reservation.transfer_id,
            epoch=self._epoch,
            request_id=request_id,
            address="decode",
            first_block=reservation.first_block,
            num_blocks=len(reservation.block_table),
            layout=self.pages.layout,
            protocol_version=codec.PROTOCOL_VERSION,
            num_tokens=reservation.num_tokens,
        )
        self._world.log(
            f"decode: ticket for {request_id}, pages {reservation.block_table}, "
            f"{reservation.first_block} of them cached"
        )
        attempt = self._world.router.attempts.get(request_id)
        if attempt is not None:
            self.sessions.send(request_id, attempt.flight.take_ticket, attempt, ticket)

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the request's router that this worker gives it up."""
        self._world.log(f"decode: gives up {request_id}: {reason.value}")
        self._world.send_failure(self.sessions, request_id, reason)
        self.sessions.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self.sessions.forget(request_id)

    def new_transfer_id(self) -> bytes:
        """The same after each restart: epochs alone must tell them apart."""
        self._num_transfers += 1
        return b"%16x" % self._num_transfers

    def now(self) -> float:
        """Virtual seconds."""
        return self._world.now

    def deadlines_changed(self) -> None:
        """Wake at the next deadline."""
        self._timer += 1
        deadline = self.handover.table.next_deadline()
        if deadline is not None:
            self._world.at(max(deadline, self._world.now), self._expire, self._timer)

    def _expire(self, timer: int) -> None:
        if timer == self._timer and not self.is_dead:
            self.handover.expire()

    # --- transfers ------------------------------------------------------------------------------------

    def deliver_beside(self, writer: Writer, message: PagesMessage, is_corrupted: bool) -> None:
        """Pages have come on another path than the writer's call."""
        transfer_id, epoch, place, payload, checksum = message
        try:
            check(payload, checksum, place, writer.layout)
            self.pages.at_work = writer.transfer.reservation
            self.handover.inbound.deliver_checked(writer, place, payload, self._world.now)
            self.taken(writer, transfer_id, epoch)
        except TransferRefused as error:
            self._world.count["refused beside: " + error.reason] += 1
            self.handover.inbound.fail(writer, error)
        else:
            if is_corrupted:
                raise Violation("corrupted pages were taken")
        finally:
            self.pages.at_work = None

    def side_arrived(self, message: PagesMessage, is_corrupted: bool) -> None:
        """A message of the side path has come, whichever incarnation it was for."""
        try:
            writer = self.handover.inbound.writer_of(message[0], message[1])
        except TransferRefused as stale:
            self._world.count["stale beside: " + stale.reason] += 1
            self.stats.outcomes[stale.reason] += 1
        else:
            self.deliver_beside(writer, message, is_corrupted)

    def record_of(self, writer: Writer) -> Record:
        """The reservation that a call writes."""
        return self._records[writer.transfer.reservation.request_id]

    def taken(self, writer: Writer, transfer_id: bytes, epoch: int) -> None:
        """A frame was taken for good."""
        record = self.record_of(writer)
        if epoch != self._epoch or transfer_id != record.reservation.transfer_id:
            raise Violation(f"{record.reservation.request_id} takes a frame of another ticket")
        record.touched = self._world.now
        if record.reservation._is_commit_asked and record.commit_came is None:
            record.commit_came = record.touched
            if not record.reservation.is_over:
                self._world.count["commit before its pages"] += 1
        record.latest = self._latest(record)

    def taint(self, writer: Writer) -> None:
        """A corrupted frame was taken: into an empty place, perhaps, so that its own stays empty."""
        record = self.record_of(writer)
        record.is_tainted = True
        if record.reservation.state is TransferState.COMMITTED:
            raise Violation(f"a corrupted frame commits {record.reservation.request_id}")

    def attached(self, writer: Writer, call: ServerCall) -> None:
        """A call may write from now on."""
        self.record_of(writer).calls.append(call)

    def detached(self, writer: Writer, call: ServerCall) -> None:
        """A call writes nothing any more."""
        self.record_of(writer).calls.remove(call)

    # --- checks ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """What holds between any two events."""
        now = self._world.now
        for reservation in self.reservations.values():
            record = self._records[reservation.request_id]
            if record.state is not reservation.state:
                record.state, record.since = reservation.state, now
                record.latest = self._latest(record)
            if now > record.latest:
                raise Violation(
                    f"the reservation of {reservation.request_id} is {record.state.value} for too long, "
                    f"since {record.since:.4f}"
                )

    def check_idle(self) -> None:
        """All has ended: nothing is left of it."""
        handover, inbound = self.handover, self.handover.inbound
        left = {
            "reservations": list(handover.table._by_transfer) + list(handover.table._by_request),
            "requests": list(self.sessions.requests),
            "prompts": handover._num_tokens,
            "open choices": handover._open_choices,
            "cut choices": handover._cut_choices,
            "inbound transfers": inbound._open,
            "writers": inbound._writers,
        }
        if any(left.values()):
            raise Violation(
                f"decode keeps {[f'{what}: {kept}' for what, kept in left.items() if kept]} in the end"
            )
        self.engine.check_idle()

    def _require_no_writer(self, request_id: str) -> None:
        record = self._records.get(request_id)
        if record is None or not record.calls or record.reservation.state is TransferState.COMMITTED:
            return
        reservation = record.reservation
        is_fenced = reservation.state is TransferState.DRAINED and self._world.now >= reservation.deadline
        if not is_fenced:
            raise Violation(
                f"pages of {request_id} are given back, which is {reservation.state.value}, though "
                f"{record.calls[0].name} may write them"
            )
        self._world.count["fenced writer"] += 1

    def _latest(self, record: Record) -> float:
        """When the reservation has to leave its state."""
        match record.state:
            case TransferState.RESERVED:
                return record.since + DEADLINES.reserved_s
            case TransferState.RECEIVING if record.commit_came is not None:
                return record.commit_came + DEADLINES.committing_s
            case TransferState.RECEIVING:
                return record.touched + DEADLINES.receiving_s
            case TransferState.ABORTING:
                copies_s = 0.0 if self._writer is None else self._writer.longest_s
                return record.since + DEADLINES.aborting_s + copies_s
        return record.since  # none of it stays in the table

    def _pass_pages_to_engine(self, request_id: str) -> None:
        record = self._records[request_id]
        if record.reservation.state is not TransferState.COMMITTED or record.is_tainted:
            raise Violation(
                f"the engine gets the pages of {request_id}, which is {record.reservation.state.value}"
                f"{', with a corrupted frame' if record.is_tainted else ''}"
            )
        self.pages.end_writes(request_id)
