"""Reservations against a naive model, in virtual time."""

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.errors import TransferRefused
from baton.core.reservation import (
    Extent,
    FramePlace,
    Reservation,
    ReservationTable,
    TransferDeadlines,
    TransferState,
)

EPOCH = 0xBA70
DEADLINES = TransferDeadlines(reserved_s=12.0, receiving_s=6.0, committing_s=4.0, aborting_s=2.0)
LONGEST_S = DEADLINES.reserved_s + DEADLINES.receiving_s + DEADLINES.aborting_s
HEADS = range(2)
PARTS = (HEADS, range(1), range(1, 2))  # what one writer may bring
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
    brought: list[range] = field(default_factory=list)  # heads of each writer
    missing: list[set[tuple[int, int]]] = field(default_factory=list)  # (block, layer), of each writer
    num_calls: int = 0
    num_writes: int = 0  # copies under way
    is_commit_asked: bool = False
    aborted_at: float | None = None

    @property
    def deadline(self) -> float | None:
        """When this state ends by itself."""
        durations = {
            State.RESERVED: DEADLINES.reserved_s,
            State.RECEIVING: DEADLINES.committing_s if self.is_commit_asked else DEADLINES.receiving_s,
            State.ABORTING: DEADLINES.aborting_s,
        }
        return self.since + durations[self.state] if self.state in durations else None

    def end(self, now: float) -> None:
        """Abort or expire a state that is not over: the pages drain once nobody writes them."""
        if self.state is State.RESERVED:
            self.state = State.DRAINED
        elif self.state is State.RECEIVING:
            self.state, self.since, self.aborted_at = State.ABORTING, now, now
        self.drain_if_alone()

    def drain_if_alone(self) -> None:
        """Without calls and copies under way nobody writes."""
        if self.state is State.ABORTING and not self.num_calls and not self.num_writes:
            self.state = State.DRAINED

    @property
    def is_complete(self) -> bool:
        """Whether every head of every block and layer has come."""
        return sum(len(heads) for heads in self.brought) == len(HEADS) and not any(self.missing)

    def touch(self, now: float) -> None:
        """Something has come."""
        if not self.is_commit_asked:
            self.since = now

    def settle(self) -> None:
        """See Reservation.settle."""
        is_written = self.is_complete and not self.num_writes
        if self.state is State.RECEIVING and self.is_commit_asked and is_written:
            self.state = State.COMMITTED

    def written(self) -> None:
        """One copy has ended."""
        self.reservation.written()
        self.num_writes -= 1
        self.settle()
        self.drain_if_alone()


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
            num_tokens=4 * num_blocks,
            heads=HEADS,
            deadlines=DEADLINES,
            now=self.now,
        )
        model = Model(reservation, block_table, num_layers, self.now)
        self.table.add(reservation)
        self.newest[reservation.request_id] = reservation
        self.known.append(model)

    @precondition(lambda self: self.known)
    @rule(which=anything, heads=st.sampled_from(PARTS))
    def open(self, which: int, heads: range) -> None:
        model = self.pick(which)
        reservation = model.reservation
        extent = Extent(reservation.first_block, len(model.block_table), model.num_layers, heads)
        taken = {head for part in model.brought for head in part}
        if model.state is State.RESERVED or (model.state is State.RECEIVING and not taken & {*heads}):
            assert reservation.open(extent, self.now) == len(model.brought)
            model.state = State.RECEIVING
            model.brought.append(heads)
            model.missing.append(self.places(model))
            model.num_calls += 1
            model.touch(self.now)
        else:
            with _refused("state"):
                reservation.open(extent, self.now)

    @precondition(lambda self: self.known)
    @rule(which=anything)
    def attach(self, which: int) -> None:
        model = self.pick(which)
        if model.state is State.RECEIVING:
            model.reservation.attach(self.now)
            model.num_calls += 1
            model.touch(self.now)
        else:
            with _refused("state"):
                model.reservation.attach(self.now)

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
        place = FramePlace(
            first_block % end_block - 1,
            num_blocks % end_block,
            first_layer % end_layer - 1,
            num_layers % end_layer,
        )
        self.accept(model, which, place)

    @precondition(lambda self: any(model.state is State.RECEIVING for model in self.known))
    @rule(which=anything, place=anything)
    def accept_one(self, which: int, place: int) -> None:
        """One layer of one block, come already or not, or right after the last block."""
        receiving = [model for model in self.known if model.state is State.RECEIVING]
        model = receiving[which % len(receiving)]
        places = sorted({*self.places(model), (len(model.block_table), 0)})
        block, layer = places[place % len(places)]
        self.accept(model, which, FramePlace(block, 1, layer, 1))

    @precondition(lambda self: any(any(model.missing) for model in self.known))
    @rule(which=anything, place=anything)
    def accept_missing(self, which: int, place: int) -> None:
        models = [model for model in self.known if any(model.missing)]
        model = models[which % len(models)]
        writer = next(index for index, missing in enumerate(model.missing) if missing)
        missing = sorted(model.missing[writer])
        block, layer = missing[place % len(missing)]
        self.accept(model, writer, FramePlace(block, 1, layer, 1))

    @precondition(lambda self: any(model.num_writes for model in self.known))
    @rule(which=anything)
    def written(self, which: int) -> None:
        writing = [model for model in self.known if model.num_writes]
        writing[which % len(writing)].written()

    @precondition(lambda self: self.known)
    @rule(which=anything, may_wait=st.booleans())
    def commit(self, which: int, may_wait: bool) -> None:
        model = self.pick(which)
        if model.state is not State.RECEIVING:
            with _refused("state"):
                model.reservation.commit(self.now, may_wait=may_wait)
        elif not model.is_complete and not may_wait:
            with _refused("incomplete"):
                model.reservation.commit(self.now, may_wait=False)
        else:
            model.reservation.commit(self.now, may_wait=may_wait)
            model.is_commit_asked, model.since = True, self.now
            model.settle()

    @precondition(lambda self: self.known)
    @rule(which=anything)
    def abort(self, which: int) -> None:
        model = self.pick(which)
        model.reservation.abort(self.now)
        model.end(self.now)

    @precondition(lambda self: any(model.num_calls for model in self.known))
    @rule(which=anything, is_complete=st.booleans())
    def call_ended(self, which: int, is_complete: bool) -> None:
        models = [model for model in self.known if model.num_calls]
        model = models[which % len(models)]
        model.reservation.call_ended(self.now, is_complete=is_complete)
        model.num_calls -= 1
        if not is_complete:
            model.end(self.now)
        model.drain_if_alone()

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
        for model in self.known:
            while model.num_writes:
                model.written()
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

    def accept(self, model: Model, which: int, place: FramePlace) -> None:
        blocks = range(place.first_block, place.first_block + place.num_blocks)
        layers = range(place.first_layer, place.first_layer + place.num_layers)
        places = {(block, layer) for block in blocks for layer in layers}
        writer = which % len(model.missing) if model.missing else 0
        if model.state is not State.RECEIVING:
            self.refuse("state", model, writer, place)
        elif not places or not places <= self.places(model):
            self.refuse("range", model, writer, place)
        elif not places <= model.missing[writer]:
            self.refuse("duplicate", model, writer, place)
        else:
            model.reservation.accept(writer, place, self.now)
            model.missing[writer] -= places
            model.touch(self.now)
            assert model.reservation.state is State.RECEIVING  # its pages are not written yet
            model.num_writes += 1
            if which % 3:  # the others' copies take a while
                model.written()

    def refuse(self, reason: str, model: Model, writer: int, place: FramePlace) -> None:
        with _refused(reason):
            model.reservation.accept(writer, place, self.now)

    def expire(self) -> None:
        late = [model for model in self.known if model.deadline is not None and model.deadline <= self.now]
        # A copy of this server's own always ends, and nothing fences it off.
        waiting = [model for model in late if model.state is State.ABORTING and model.num_writes]
        for model in waiting:
            model.since = self.now
        due = [model for model in late if model not in waiting]
        assert self.table.expire(self.now) == [model.reservation for model in due]
        for model in due:
            if model.state is State.ABORTING:
                model.state = State.DRAINED
            else:
                model.end(self.now)

    def check_drained(self, model: Model) -> None:
        """Pages go back to the pool only when nobody writes them any more, or can."""
        if model.reservation.state is State.DRAINED and model.num_calls:
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


def _nothing_missing() -> Reservation:
    return Reservation(
        b"t",
        "r",
        block_table=(4, 5),
        first_block=2,
        num_tokens=8,
        heads=HEADS,
        deadlines=DEADLINES,
        now=0.0,
    )


def test_a_reservation_without_missing_blocks_still_needs_a_writer() -> None:
    reservation = _nothing_missing()
    with _refused("state"):
        reservation.commit(0.0, may_wait=True)
    reservation.open(Extent(2, 2, 3, HEADS), 0.0)
    reservation.commit(0.0, may_wait=False)
    assert reservation.state is State.COMMITTED


def test_a_committed_transfer_cannot_be_taken_back() -> None:
    reservation = _nothing_missing()
    reservation.open(Extent(2, 2, 3, HEADS), 0.0)
    reservation.commit(0.0, may_wait=False)
    reservation.abort(1.0)
    reservation.call_ended(1.0, is_complete=False)
    assert not reservation.expire(1000.0)
    assert reservation.state is State.COMMITTED


def test_a_commit_waits_for_the_heads_of_another_writer() -> None:
    reservation = _nothing_missing()
    reservation.open(Extent(2, 2, 3, range(1)), 0.0)
    reservation.commit(0.0, may_wait=True)
    assert reservation.state is State.RECEIVING
    reservation.open(Extent(2, 2, 3, range(1, 2)), 0.0)
    reservation.settle()
    assert reservation.state is State.COMMITTED
