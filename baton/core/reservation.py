"""Who may write the pages that a decode server keeps for a prompt on its way: a pure state machine.

                 open            commit, and all pages are there
    RESERVED ───────────▶ RECEIVING ───────────▶ COMMITTED   (the engine writes from here on)
        │ abort, deadline     │ abort, deadline, failed check
        │                     ▼
        │                  ABORTING   no frame is accepted any more; some writer has not let go yet
        ▼                     │ every writer lets go, or the deadline fences them off
     DRAINED ◀────────────────┘    (the pages may go back to the pool)

A page has one writer at a time: the transfer until COMMITTED, the engine after. Pages on a device are written
by copies that take a while: as long as one is under way, the reservation neither commits nor drains, whatever
the peer does, since the copy is this server's own and always ends. Every state but the last ones has a
deadline. Time comes in as an argument, in seconds of any monotonic clock.
"""

from dataclasses import dataclass
from enum import Enum

from baton.core.errors import TransferRefused


class TransferState(Enum):
    """Where one reservation's transfer is."""

    RESERVED = "reserved"
    RECEIVING = "receiving"
    COMMITTED = "committed"
    ABORTING = "aborting"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class TransferDeadlines:
    """How long each state may last, in seconds; RECEIVING's clock starts anew with every frame."""

    reserved_s: float = 120.0  # the router and prefill take the ticket up
    # A transfer opens when its prompt joins prefill's queue, and a prefill server that dies breaks its calls:
    # this is only for one that lives and hangs, so no shorter than any queue.
    receiving_s: float = 600.0
    committing_s: float = 30.0  # the commit has come, pages on another path have not
    aborting_s: float = 5.0

    @classmethod
    def at_most(cls, seconds: float) -> "TransferDeadlines":
        """The usual deadlines, none of them longer than this."""
        usual = cls()
        return cls(
            reserved_s=min(seconds, usual.reserved_s),
            receiving_s=min(seconds, usual.receiving_s),
            committing_s=min(seconds, usual.committing_s),
            aborting_s=min(seconds, usual.aborting_s),
        )


@dataclass(frozen=True, slots=True)
class Extent:
    """What one writer brings: blocks of its own size, all layers, some of the model's KV heads."""

    first_block: int
    end_block: int
    num_layers: int
    heads: range


@dataclass(frozen=True, slots=True)
class FramePlace:
    """Where a frame's payload belongs: some layers of some consecutive blocks of the request's block table,
    counted in blocks of the sender's size."""

    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


class _Writer:
    """One sender's blocks and layers, and which of them have not come."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        # Bit l of missing[b]: layer l of block first_block + b has not come yet.
        self._missing = [(1 << extent.num_layers) - 1] * max(0, extent.end_block - extent.first_block)
        self.num_missing = extent.num_layers * len(self._missing)

    def take(self, place: FramePlace) -> None:
        """Note a place as written. Raises TransferRefused where it is outside, or has come already."""
        self._require_inside(place)
        layers = ((1 << place.num_layers) - 1) << place.first_layer
        offset = place.first_block - self.extent.first_block
        for index in range(offset, offset + place.num_blocks):
            if self._missing[index] & layers != layers:
                raise TransferRefused("duplicate", f"block {place.first_block} came twice")
        for index in range(offset, offset + place.num_blocks):
            self._missing[index] &= ~layers
        self.num_missing -= place.num_layers * place.num_blocks

    def _require_inside(self, place: FramePlace) -> None:
        extent = self.extent
        end_block, end_layer = place.first_block + place.num_blocks, place.first_layer + place.num_layers
        blocks_fit = extent.first_block <= place.first_block < end_block <= extent.end_block
        layers_fit = 0 <= place.first_layer < end_layer <= extent.num_layers
        if not (blocks_fit and layers_fit):
            raise TransferRefused(
                "range",
                f"frame for blocks {place.first_block}+{place.num_blocks}, layers {place.first_layer}+"
                f"{place.num_layers} is outside blocks {extent.first_block} to {extent.end_block} and "
                f"{extent.num_layers} layers",
            )


class Reservation:
    """The right to fill blocks [first_block, num_blocks) of one request's block table.

    It may have several writers, which bring different KV heads, and each may use several calls.
    """

    def __init__(
        self,
        transfer_id: bytes,
        request_id: str,
        *,
        block_table: tuple[int, ...],
        first_block: int,
        num_tokens: int,
        heads: range,
        deadlines: TransferDeadlines,
        now: float,
    ) -> None:
        self.transfer_id = transfer_id
        self.request_id = request_id
        self.block_table = block_table
        self.first_block = first_block
        self.num_tokens = num_tokens  # of the prompt
        self.state = TransferState.RESERVED
        self.deadline = now + deadlines.reserved_s
        self._heads = heads  # of the model, that the pages hold
        self._deadlines = deadlines
        self._writers: list[_Writer] = []
        self._num_calls = 0  # of writers, that have not ended
        self._num_writes = 0  # copies into pages that are under way on this server's device
        self._is_commit_asked = False

    def open(self, extent: Extent, now: float) -> int:
        """A writer takes the pages, with one call; returns its index.

        Raises TransferRefused unless nobody has yet, or those who have bring other heads.
        """
        if self.state is TransferState.RECEIVING:
            taken = {head for writer in self._writers for head in writer.extent.heads}
            if taken.intersection(extent.heads):
                raise TransferRefused("state", f"transfer of {self.request_id} has a writer already")
        elif self.state is not TransferState.RESERVED:
            raise TransferRefused("state", f"transfer of {self.request_id} is {self.state.value} already")
        self.state = TransferState.RECEIVING
        self._writers.append(_Writer(extent))
        self._num_calls += 1
        self._touch(now)
        return len(self._writers) - 1

    def attach(self, now: float) -> None:
        """A writer uses one more call. Raises TransferRefused unless pages may be written."""
        self._require_receiving("another call")
        self._num_calls += 1
        self._touch(now)

    def accept(self, writer: int, place: FramePlace, now: float) -> None:
        """Check a frame's place and note it as written.

        The caller begins to write its pages, and calls `written` when that is done. Raises TransferRefused
        where the frame is outside the reservation, comes twice, or the state takes none.
        """
        self._require_receiving("frame")
        self._writers[writer].take(place)
        self._num_writes += 1
        self._touch(now)

    def written(self) -> None:
        """The pages of one accepted frame are written, or never will be."""
        self._num_writes -= 1
        self.settle()
        self._drain_if_alone()

    def commit(self, now: float, *, may_wait: bool) -> None:
        """The writer has sent everything; with `may_wait` some of it may still be on another path.

        Raises TransferRefused where the state takes no commit, or pages are missing that nothing can bring.
        """
        self._require_receiving("commit")
        if self._num_missing and not may_wait:
            raise TransferRefused(
                "incomplete", f"commit for {self.request_id} with {self._num_missing} block layers missing"
            )
        self._is_commit_asked = True
        self.deadline = now + self._deadlines.committing_s
        self.settle()

    def settle(self) -> None:
        """Every head, block and layer is there and the commit has come: the pages pass to the engine."""
        is_complete = self._is_commit_asked and not self._num_missing and not self._num_writes
        if self.state is TransferState.RECEIVING and is_complete:
            self.state = TransferState.COMMITTED

    def abort(self, now: float) -> None:
        """Give up, unless the engine has the pages already; writers at work have to let go first."""
        if self.state is TransferState.RESERVED:
            self.state = TransferState.DRAINED
        elif self.state is TransferState.RECEIVING:
            self.state = TransferState.ABORTING
            self.deadline = now + self._deadlines.aborting_s
            self._drain_if_alone()

    def call_ended(self, now: float, *, is_complete: bool) -> None:
        """A writer's call has ended: it writes nothing any more. One that left pages open ends all."""
        self._num_calls -= 1
        if not is_complete:
            self.abort(now)
        self._drain_if_alone()

    def expire(self, now: float) -> bool:
        """Move on if this state's deadline has passed; returns whether it had."""
        if self.is_over or now < self.deadline:
            return False
        if self.state is TransferState.ABORTING and self._num_writes:
            self.deadline = now + self._deadlines.aborting_s
            return False
        if self.state is TransferState.ABORTING:
            # Frames are refused since the abort, so that whoever still sends is fenced off.
            self.state = TransferState.DRAINED
        else:
            self.abort(now)
        return True

    @property
    def is_over(self) -> bool:
        """Whether the transfer is no writer of the pages any more."""
        return self.state in (TransferState.COMMITTED, TransferState.DRAINED)

    @property
    def _num_missing(self) -> int:
        """Block layers that have not come; heads that nobody brings count as one each."""
        brought = sum(len(writer.extent.heads) for writer in self._writers)
        return sum(writer.num_missing for writer in self._writers) + len(self._heads) - brought

    def _require_receiving(self, what: str) -> None:
        if self.state is not TransferState.RECEIVING:
            raise TransferRefused("state", f"{what} for {self.request_id}, which is {self.state.value}")

    def _touch(self, now: float) -> None:
        if not self._is_commit_asked:
            self.deadline = now + self._deadlines.receiving_s

    def _drain_if_alone(self) -> None:
        if self.state is TransferState.ABORTING and self._num_calls == 0 and self._num_writes == 0:
            self.state = TransferState.DRAINED


class ReservationTable:
    """All reservations of one epoch of a decode server."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._by_transfer: dict[bytes, Reservation] = {}
        self._by_request: dict[str, Reservation] = {}

    def __len__(self) -> int:
        return len(self._by_transfer)

    def add(self, reservation: Reservation) -> None:
        """Make a new reservation known."""
        self._by_transfer[reservation.transfer_id] = reservation
        self._by_request[reservation.request_id] = reservation

    def find(self, transfer_id: bytes, epoch: int) -> Reservation:
        """The reservation that a frame speaks of. Raises TransferRefused for a stale or unknown ticket."""
        if epoch != self.epoch:
            raise TransferRefused("epoch", f"ticket of epoch {epoch:x}; this server's is {self.epoch:x}")
        reservation = self._by_transfer.get(transfer_id)
        if reservation is None:
            raise TransferRefused("ticket", "no such ticket: it has expired, or was never issued")
        return reservation

    def of_request(self, request_id: str) -> Reservation | None:
        """The reservation of a request whose transfer is not over."""
        return self._by_request.get(request_id)

    def remove(self, reservation: Reservation) -> None:
        """Forget a reservation that is over; its ticket is worth nothing from now on."""
        del self._by_transfer[reservation.transfer_id]
        # The request may have been reserved anew while this one's writer was still letting go.
        if self._by_request.get(reservation.request_id) is reservation:
            del self._by_request[reservation.request_id]

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        deadlines = (held.deadline for held in self._by_transfer.values() if not held.is_over)
        return min(deadlines, default=None)

    def expire(self, now: float) -> list[Reservation]:
        """Move every reservation whose deadline has passed; returns those."""
        return [reservation for reservation in self._by_transfer.values() if reservation.expire(now)]
