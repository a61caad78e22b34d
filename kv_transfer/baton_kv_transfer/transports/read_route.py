"""Pages that the decode server reads out of this server's pool: the call only says where they lie."""

import asyncio

from baton.core.kv_layout import KVLayout
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import PagesToSend, frame_places
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transports.base import Route, RouteRequest


class ReadRoute(Route):
    """Tells the decode server which blocks to read."""

    # Of one read: enough that its own cost is small (on a GPU that is two waits for the device), and little
    # enough that some fit into the landing buffer side by side.
    read_bytes: int
    # No other refusal has this reason: reads never end where the network swallows what is not gRPC.
    failures = frozenset({"deadline"})
    keeps_pages = True  # until decode has read and committed them

    def __init__(
        self, request: RouteRequest, layout: KVLayout, reader: PageReader, memory: transfer_pb2.Open
    ) -> None:
        """`memory`: the part of an Open that says where this server's pool is to be read."""
        self._ticket = request.ticket
        self._call = request.calls[0]
        self._stall_timeout_s = request.stall_timeout_s
        self._layout = layout
        self._reader = reader
        self._memory = memory

    def describe(self, opening: transfer_pb2.Open) -> None:
        """See Route."""
        opening.MergeFrom(self._memory)

    async def send(self, pages: PagesToSend) -> int:
        """See Route; counts descriptors."""
        for place in frame_places(self._layout, pages.place, self.read_bytes):
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
