"""Pages as bytes, which check each write and each read of a transfer against who owns the page."""

from functools import cache

from baton.core.kv_layout import KVLayout
from baton.core.reservation import Reservation, TransferState
from tests.simulation.schedule import Violation

NUM_LAYERS = 2
STATE_BYTES = 8


@cache
def layout_of(block_size: int) -> KVLayout:
    """One head of two float32: eight bytes a slot in K, and eight in V."""
    return KVLayout(block_size, NUM_LAYERS, num_kv_heads=1, head_dim=2, dtype="float32")


class Pages:
    """Implements `baton.core.page_ports.PageStore`; fresh pages hold a pattern that is no state."""

    device_pages = None

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.layout = layout_of(block_size)
        self.num_blocks = num_blocks
        self.bytes = bytearray(b"\xa5" * (num_blocks * self.layout.bytes_per_block))
        self.memory = memoryview(self.bytes)
        self._bytes_per_layer = self.layout.bytes_per_layer
        # By block. On decode: the request whose transfer may write it, from the reservation to the commit.
        self.writers: list[str | None] = [None] * num_blocks
        # On prefill: how many holds its transfers have.
        self.holds = [0] * num_blocks

    def offset(self, block_id: int, layer: int) -> int:
        """Where one layer of one page begins."""
        return (block_id * NUM_LAYERS + layer) * self._bytes_per_layer

    def raw_page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore; unchecked, as memory is that another machine reads."""
        start = self.offset(block_id, first_layer)
        return self.memory[start : start + num_layers * self._bytes_per_layer]

    def end_writes(self, request_id: str) -> None:
        """The request's transfer is over: it writes nothing any more."""
        for block, writer in enumerate(self.writers):
            if writer == request_id:
                self.writers[block] = None

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        if not (
            0 <= block_id < self.num_blocks and 0 <= first_layer < first_layer + num_layers <= NUM_LAYERS
        ):
            raise Violation(f"no such page: {block_id}, layers {first_layer}+{num_layers}")
        return self.raw_page(block_id, first_layer, num_layers)


class PrefillPages(Pages):
    """Transfers only read, and only what is held for them."""

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        if self.holds[block_id] < 1:
            raise Violation(f"prefill's page {block_id} is read for a transfer, but not held for any")
        return super().page(block_id, first_layer, num_layers)


class DecodePages(Pages):
    """Transfers only write, each only the pages of its own request."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        super().__init__(block_size, num_blocks)
        self.at_work: Reservation | None = None  # whose transfer is delivering
        self.written_in = {TransferState.RECEIVING}  # states of it

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        reservation = self.at_work
        if reservation is None:
            raise Violation(f"decode's page {block_id} is written by no transfer")
        if self.writers[block_id] != reservation.request_id or reservation.state not in self.written_in:
            raise Violation(
                f"decode's page {block_id} is written by the transfer of {reservation.request_id}, which is "
                f"{reservation.state.value}; its writer is {self.writers[block_id] or 'not a transfer'}"
            )
        return super().page(block_id, first_layer, num_layers)
