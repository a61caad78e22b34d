"""Reservations against a naive model, in virtual time."""

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.errors import TransferRefused
from baton.core.reservation import Reservation, ReservationTable, TransferDeadlines, TransferState

EPOCH = 0xBA70
DEADLINES = TransferDeadlines(reserved_s=12.0, receiving_s=6.0, aborting_s=2.0)
LONGEST_S = DEADLINES.reserved_s + DEADLINES.receiving_s + DEADLINES.aborting_s
anything = st.integers(min_value=0, max_value=2**16)
seconds = st.sampled_from([0.0, 1.0, 1.0, 2.0, 5.0, 12.0])
State = TransferState


@dataclass(eq=False)
class Model:
    """What is known of one reservation from the outside."""

    reservation: Reservation
    block_table: tuple[int, ...]
    num_layers: int
    since: float  # when the state's clock last started
    state: TransferState = State.RESERVED
    missing: set[tuple[int, int]] = field(default_factory=set)  # (block, layer)
    has_writer: bool = False
    aborted_at: float | None = None

    @property
    def deadline(self) -> float | None:
        """When this state ends by itself."""
        durations = {
            State.RESERVED: DEADLINES.reserved_s,
            State.RECEIVING: DEADLINES.receiving_s,
            State.ABORTING: DEADLINES.aborting_s,
        }
        return self.since + durations[self.state] if self.state in durations else None

    def end(self, now: float) -> None:
        """Abort or expire a state that is not over: the pages drain once nobody writes them."""
        if self.state is State.RESERVED:
            self.state = State.DRAINED
        elif self.state is State.RECEIVING:
            self.state, self.since, self.aborted_at = State.ABORTING, now, now


class ReservationMachine(RuleBasedStateMachine):
    """Several reservations of one table at once."""

    @initialize()
    def start(self) -> None:
        self.now = 100.0
        self.table = ReservationTable(EPOCH)
        self.known: list[Model] = []
        self.newest: dict[str, Reservation] = {}  # of each request
        self.num_made = 0

    @precondition(lambda self: len(self.known) < 4)
    @rule(num_blocks=st.integers(1, 5), first=anything, num_layers=st.integers(1, 3))
    def reserve(self, num_blocks: int, first: int, num_layers: int) -> None:
        self.num_made += 1
        block_table = tuple(range(10 * self.num_made, 10 * self.num_made + num_blocks))
        reservation = Reservation(
            self.num_made.to_bytes(16, "big"),
            # The ids repeat: a request is reserved anew while its first transfer still drains.
            f"request {self.num_made % 2}",
            block_table=block_table,
            first_block=first % (num_blocks + 1),
            num_layers=num_layers,
            deadlines=DEADLINES,
            now=self.now,
        )
        model = Model(reservation, block_table, num_layers, self.now)
        blocks = range(reservation.first_block, num_blocks)
        model.missing = {(block, layer) for block in blocks for layer in range(num_layers)}
        self.table.add(reservation)
        self.newest[reservation.request_id] = reservation
        self.known.append(model)

    @precondition(lambda self: self.known)
    @rule(which=anything)
    def open(self, which: int) -> None:
        model = self.pick(which)
        if model.state is State.RESERVED:
            model.reservation.open(self.now)
            model.state, model.since, model.has_writer = State.RECEIVING, self.now, True
        else:
            with _refused("state"):
                model.reservation.open(self.now)

    @precondition(lambda self: self.known)
    @rule(
        which=anything, first_block=anything, num_blocks=anything, first_layer=anything, num_layers=anything
    )
    def accept_anywhere(
        self, which: int, first_block: int, num_blocks: int, first_layer: int, num_layers: int
    ) -> None:
        """Inside the reservation, partly or wholly written already, or a little outside."""
        model = self.pick(which)
        end_block, end_layer = len(model.block_table) + 2, model.num_layers + 2
        self.accept(
            model,
            first_block % end_block - 1,
            num_blocks % end_block,
            first_layer % end_layer - 1,
            num_layers % end_layer,
        )

    @precondition(lambda self: any(model.state is State.RECEIVING for model in self.known))
    @rule(which=anything, place=anything)
    def accept_one(self, which: int, place: int) -> None:
        """One layer of one block, come already or not, or right after the last block."""
        receiving = [model for model in self.known if model.state is State.RECEIVING]
        model = receiving[which % len(receiving)]
        places = sorted({*self.places(model), (len(model.block_table), 0)})
        block, layer = places[place % len(places)]
        self.accept(model, block, 1, layer, 1)

    @precondition(lambda self: any(model.missing for model in self.known))
    @rule(which=anything, place=anything)
    def accept_missing(self, which: int, place: int) -> None:
        models = [model for model in self.known if model.missing]
        model = models[which % len(models)]
        block, layer = sorted(model.missing)[place % len(model.missing)]
        self.accept(model, block, 1, layer, 1)

    @precondition(lambda self: self.known)
    @rule(which=anything)
    def commit(self, which: int) -> None:
        model = self.pick(which)
        if model.state is not State.RECEIVING:
            with _refused("state"):
                model.reservation.commit()
        elif model.missing:
            with _refused("incomplete"):
                model.reservation.commit()
        else:
            model.reservation.commit()
            model.state = State.COMMITTED

    @precondition(lambda self: self.known)
    @rule(which=anything)
    def abort(self, which: int) -> None:
        model = self.pick(which)
        model.reservation.abort(self.now)
        model.end(self.now)

    @precondition(lambda self: self.known)
    @rule(which=anything)
    def writer_gone(self, which: int) -> None:
        model = self.pick(which)
        model.reservation.writer_gone(self.now)
        model.has_writer = False
        model.end(self.now)
        if model.state is State.ABORTING:
            model.state = State.DRAINED

    @rule(duration=seconds)
    def wait(self, duration: float) -> None:
        self.now += duration
        self.expire()

    @precondition(lambda self: any(model.reservation.is_over for model in self.known))
    @rule(which=anything)
    def remove(self, which: int) -> None:
        over = [model for model in self.known if model.reservation.is_over]
        model = over[which % len(over)]
        self.table.remove(model.reservation)
        self.known.remove(model)
        if self.newest.get(model.reservation.request_id) is model.reservation:
            del self.newest[model.reservation.request_id]
        with _refused("ticket"):
            self.table.find(model.reservation.transfer_id, EPOCH)

    @rule(transfer=anything, epoch=st.integers(0, 2**64 - 1))
    def find_stale_tickets(self, transfer: int, epoch: int) -> None:
        with _refused("ticket"):
            self.table.find(b"never issued", EPOCH)
        if self.known and epoch != EPOCH:
            with _refused("epoch"):
                self.table.find(self.pick(transfer).reservation.transfer_id, epoch)

    @invariant()
    def agrees(self) -> None:
        assert len(self.table) == len(self.known)
        for model in self.known:
            assert self.table.find(model.reservation.transfer_id, EPOCH) is model.reservation
            assert model.reservation.state is model.state
            assert model.reservation.is_over == (model.deadline is None)
            self.check_drained(model)
        for request_id in ("request 0", "request 1", "request 2"):
            assert self.table.of_request(request_id) is self.newest.get(request_id)
        deadlines = [model.deadline for model in self.known if model.deadline is not None]
        assert self.table.next_deadline() == min(deadlines, default=None)

    def teardown(self) -> None:
        """Once only time goes on, everything is over soon, without looking more often than told to."""
        start = self.now
        for _ in range(3 * len(self.known)):
            deadline = self.table.next_deadline()
            if deadline is None:
                break
            self.now = max(self.now, deadline)
            self.expire()
            self.agrees()
        assert all(model.reservation.is_over for model in self.known)
        assert self.now - start <= LONGEST_S

    def accept(
        self, model: Model, first_block: int, num_blocks: int, first_layer: int, num_layers: int
    ) -> None:
        blocks = range(first_block, first_block + num_blocks)
        layers = range(first_layer, first_layer + num_layers)
        places = {(block, layer) for block in blocks for layer in layers}
        takes = lambda: model.reservation.accept(first_block, num_blocks, first_layer, num_layers, self.now)  # noqa: E731
        if model.state is not State.RECEIVING:
            with _refused("state"):
                takes()
        elif not places or not places <= self.places(model):
            with _refused("range"):
                takes()
        elif not places <= model.missing:
            with _refused("duplicate"):
                takes()
        else:
            assert takes() == tuple(model.block_table[block] for block in blocks)
            model.missing -= places
            model.since = self.now

    def expire(self) -> None:
        due = [model for model in self.known if model.deadline is not None and model.deadline <= self.now]
        assert self.table.expire(self.now) == [model.reservation for model in due]
        for model in due:
            if model.state is State.ABORTING:
                model.state = State.DRAINED
            else:
                model.end(self.now)

    def check_drained(self, model: Model) -> None:
        """Pages go back to the pool only when nobody writes them any more, or can."""
        if model.reservation.state is State.DRAINED and model.has_writer:
            assert model.aborted_at is not None
            assert self.now >= model.aborted_at + DEADLINES.aborting_s, "drained under its writer"

    def pick(self, which: int) -> Model:
        return self.known[which % len(self.known)]

    def places(self, model: Model) -> set[tuple[int, int]]:
        blocks = range(model.reservation.first_block, len(model.block_table))
        return {(block, layer) for block in blocks for layer in range(model.num_layers)}


def _refused(reason: str) -> "pytest.RaisesExc[TransferRefused]":
    return pytest.raises(TransferRefused, check=lambda error: error.reason == reason)


TestReservation = ReservationMachine.TestCase


def test_a_reservation_without_missing_blocks_still_needs_a_writer() -> None:
    reservation = Reservation(
        b"t", "r", block_table=(4, 5), first_block=2, num_layers=3, deadlines=DEADLINES, now=0.0
    )
    with _refused("state"):
        reservation.commit()
    reservation.open(0.0)
    reservation.commit()
    assert reservation.state is State.COMMITTED


def test_a_committed_transfer_cannot_be_taken_back() -> None:
    reservation = Reservation(
        b"t", "r", block_table=(4,), first_block=1, num_layers=1, deadlines=DEADLINES, now=0.0
    )
    reservation.open(0.0)
    reservation.commit()
    reservation.abort(1.0)
    reservation.writer_gone(1.0)
    assert not reservation.expire(1000.0)
    assert reservation.state is State.COMMITTED
