"""Pages that the decode server reads out of this server's pool with NIXL: both sides beside the call."""

import asyncio
from collections.abc import Sequence

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.ports import PageStore
from baton.core.reservation import FramePlace
from baton.rpc.ticket import Ticket
from baton.v1 import transfer_pb2
from kv_transfer import wire
from kv_transfer.frames import checksum, frame_places, views
from kv_transfer.outbound import PagesToSend
from kv_transfer.route import PushCall
from kv_transfer.transports.nixl_memory import Landing, NixlReader, NixlSource, RemoteMemory

# Pages of one read: enough that a read's own cost is small, and little enough that some fit into the landing
# buffer side by side.
READ_BYTES = 4 << 20


class NixlRoute:
    """Tells the decode server which blocks to read (kv_transfer.route.Route)."""

    name = "nixl"
    keeps_pages = True  # until decode has read and committed them
    waits_for_open = False

    def __init__(
        self,
        ticket: Ticket,
        store: PageStore,
        source: NixlSource,
        call: PushCall,
        stall_timeout_s: float,
    ) -> None:
        self._ticket = ticket
        self._store = store
        self._source = source
        self._call = call
        self._stall_timeout_s = stall_timeout_s

    def describe(self, opening: transfer_pb2.Open) -> None:
        """See Route."""
        remote = self._source.remote
        opening.nixl.agent_metadata = remote.agent_metadata
        opening.nixl.base_address = remote.base_address
        opening.nixl.num_blocks = remote.num_blocks

    async def send(self, pages: PagesToSend) -> int:
        """See Route; counts descriptors."""
        num_descriptors = 0
        for place in frame_places(self._store.layout, pages.place, READ_BYTES):
            first = place.first_block - pages.place.first_block
            blocks = pages.blocks[first : first + place.num_blocks]
            async with asyncio.timeout(self._stall_timeout_s):
                await self._call.write(self._frame(place, blocks))
            num_descriptors += len(blocks)
        return num_descriptors

    async def finish(self) -> None:
        """See Route."""

    def _frame(self, place: FramePlace, blocks: Sequence[int]) -> bytes:
        head = wire.pages_message(place, checksum(views(self._store, blocks, place)))
        frame = transfer_pb2.TransferFrame(
            transfer_id=self._ticket.transfer_id,
            epoch=self._ticket.epoch,
            shipped=transfer_pb2.Shipped(pages=head, source_blocks=blocks),
        )
        return frame.SerializeToString()


def remote_memory(memory: transfer_pb2.NixlMemory, layout: KVLayout) -> RemoteMemory:
    """The sender's pool, whose pages have `layout`."""
    return RemoteMemory(memory.agent_metadata, memory.base_address, memory.num_blocks, layout.bytes_per_block)


async def read_shipped(
    reader: NixlReader,
    memory: transfer_pb2.NixlMemory,
    layout: KVLayout,
    shipped: transfer_pb2.Shipped,
    timeout_s: float,
) -> Landing:
    """Fetch the pages that a frame names out of the sender's pool, whose pages have `layout`.

    Raises TransferRefused where the frame does not hold together, or the pages can't be read or are wrong.
    """
    place = wire.place_of(shipped.pages)
    if len(shipped.source_blocks) != place.num_blocks:
        raise TransferRefused("frame", f"{place.num_blocks} blocks, and {len(shipped.source_blocks)} places")
    if place.first_layer + place.num_layers > layout.num_layers:
        raise TransferRefused("range", f"layers up to {place.first_layer + place.num_layers}")
    remote = remote_memory(memory, layout)
    offset, length = place.first_layer * layout.bytes_per_layer, place.num_layers * layout.bytes_per_layer
    ranges = [(block * layout.bytes_per_block + offset, length) for block in shipped.source_blocks]
    return await reader.read(remote, ranges, crc=shipped.pages.crc32c, timeout_s=timeout_s)
