"""Who may write the pages that a decode server keeps for a prompt on its way: a pure state machine.

                 open            commit
    RESERVED ───────────▶ RECEIVING ───────────▶ COMMITTED   (the engine writes from here on)
        │ abort, deadline     │ abort, deadline, failed check
        │                     ▼
        │                  ABORTING   no frame is accepted any more; the writer has not let go yet
        ▼                     │ the writer lets go, or the deadline fences it off
     DRAINED ◀────────────────┘    (the pages may go back to the pool)

A page has one writer at a time: the transfer until COMMITTED, the engine after. Every state but the last ones
has a deadline. Time comes in as an argument, in seconds of any monotonic clock.
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
    aborting_s: float = 5.0


class Reservation:
    """The right to fill blocks [first_block, num_blocks) of one request's block table."""

    def __init__(
        self,
        transfer_id: bytes,
        request_id: str,
        *,
        block_table: tuple[int, ...],
        first_block: int,
        num_layers: int,
        deadlines: TransferDeadlines,
        now: float,
    ) -> None:
        self.transfer_id = transfer_id
        self.request_id = request_id
        self.first_block = first_block
        self.state = TransferState.RESERVED
        self.deadline = now + deadlines.reserved_s
        self._block_table = block_table
        self._num_layers = num_layers
        self._deadlines = deadlines
        # Bit l of _missing[b]: layer l of block first_block + b has not come yet.
        self._missing = [(1 << num_layers) - 1] * (len(block_table) - first_block)
        self._num_missing = num_layers * len(self._missing)

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole prompt."""
        return len(self._block_table)

    def open(self, now: float) -> None:
        """A writer takes the pages. Raises TransferRefused unless nobody has yet."""
        if self.state is not TransferState.RESERVED:
            raise TransferRefused("state", f"transfer of {self.request_id} is {self.state.value} already")
        self.state = TransferState.RECEIVING
        self.deadline = now + self._deadlines.receiving_s

    def accept(
        self, first_block: int, num_blocks: int, first_layer: int, num_layers: int, now: float
    ) -> tuple[int, ...]:
        """Check a frame's place and note it as written; returns the pages that the writer now writes.

        The caller writes them before it calls anything else here. Raises TransferRefused where the frame
        is outside the reservation, comes twice, or the state takes none.
        """
        if self.state is not TransferState.RECEIVING:
            raise TransferRefused("state", f"frame for {self.request_id}, which is {self.state.value}")
        self._require_inside(first_block, num_blocks, first_layer, num_layers)
        layers = ((1 << num_layers) - 1) << first_layer
        offset = first_block - self.first_block
        for index in range(offset, offset + num_blocks):
            if self._missing[index] & layers != layers:
                raise TransferRefused("duplicate", f"block {first_block} of {self.request_id} came twice")
        for index in range(offset, offset + num_blocks):
            self._missing[index] &= ~layers
        self._num_missing -= num_layers * num_blocks
        self.deadline = now + self._deadlines.receiving_s
        return self._block_table[first_block : first_block + num_blocks]

    def commit(self) -> None:
        """Every block and layer is there: the pages pass to the engine. Raises TransferRefused if not."""
        if self.state is not TransferState.RECEIVING:
            raise TransferRefused("state", f"commit for {self.request_id}, which is {self.state.value}")
        if self._num_missing:
            raise TransferRefused(
                "incomplete", f"commit for {self.request_id} with {self._num_missing} block layers missing"
            )
        self.state = TransferState.COMMITTED

    def abort(self, now: float) -> None:
        """Give up, unless the engine has the pages already; a writer at work has to let go first."""
        if self.state is TransferState.RESERVED:
            self.state = TransferState.DRAINED
        elif self.state is TransferState.RECEIVING:
            self.state = TransferState.ABORTING
            self.deadline = now + self._deadlines.aborting_s

    def writer_gone(self, now: float) -> None:
        """The writer has let go: nothing will be written any more. A transfer that it left open is over."""
        self.abort(now)
        if self.state is TransferState.ABORTING:
            self.state = TransferState.DRAINED

    def expire(self, now: float) -> bool:
        """Move on if this state's deadline has passed; returns whether it had."""
        if self.is_over or now < self.deadline:
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

    def _require_inside(self, first_block: int, num_blocks: int, first_layer: int, num_layers: int) -> None:
        blocks_fit = self.first_block <= first_block < first_block + num_blocks <= self.num_blocks
        layers_fit = 0 <= first_layer < first_layer + num_layers <= self._num_layers
        if not (blocks_fit and layers_fit):
            raise TransferRefused(
                "range",
                f"frame for blocks {first_block}+{num_blocks}, layers {first_layer}+{num_layers} is outside "
                f"blocks {self.first_block} to {self.num_blocks} and {self._num_layers} layers",
            )


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
