"""Pages that the decode server reads out of this server's pool: the call only says where they lie."""

import asyncio
from collections.abc import Callable

from baton.core.kv_layout import KVLayout
from baton.core.ticket import Ticket
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import frame_places
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transfers.outbound import PagesToSend
from baton_kv_transfer.transports.grpc_push import PushCall

# Pages of one read, by transport: enough that a read's own cost is small (on a GPU that is two waits for the
# device), and little enough that some fit into the landing buffer side by side.
READ_BYTES = {"nixl": 8 << 20, "cuda_ipc": 16 << 20}


class ReadRoute:
    """Tells the decode server which blocks to read (baton_kv_transfer.transports.grpc_push.Route)."""

    keeps_pages = True  # until decode has read and committed them
    waits_for_open = False

    def __init__(
        self,
        name: str,
        ticket: Ticket,
        layout: KVLayout,
        reader: PageReader,
        describe: Callable[[transfer_pb2.Open], None],
        call: PushCall,
        stall_timeout_s: float,
    ) -> None:
        self.name = name
        self.describe = describe
        self._ticket = ticket
        self._layout = layout
        self._reader = reader
        self._call = call
        self._stall_timeout_s = stall_timeout_s

    async def send(self, pages: PagesToSend) -> int:
        """See Route; counts descriptors."""
        for place in frame_places(self._layout, pages.place, READ_BYTES[self.name]):
            first = place.first_block - pages.place.first_block
            blocks = pages.blocks[first : first + place.num_blocks]
            head = wire.pages_message(place, await self._reader.checksum(place, blocks))
            frame = transfer_pb2.TransferFrame(
                transfer_id=self._ticket.transfer_id,
                epoch=self._ticket.epoch,
                shipped=transfer_pb2.Shipped(pages=head, source_blocks=blocks),
            )
            async with asyncio.timeout(self._stall_timeout_s):
                await self._call.write(frame.SerializeToString())
        return len(pages.blocks)

    async def finish(self) -> None:
        """See Route."""
