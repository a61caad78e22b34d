"""Pages that the decode server reads out of this server's pool with NIXL: both sides beside the call."""

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.transports.nixl.reader import Landing, NixlReader, NixlSource, RemoteMemory


def describe(source: NixlSource, opening: transfer_pb2.Open) -> None:
    """Say in a transfer's first frame where the pages can be read."""
    remote = source.remote
    opening.nixl.agent_metadata = remote.agent_metadata
    opening.nixl.base_address = remote.base_address
    opening.nixl.num_blocks = remote.num_blocks
    if remote.gpu_index is not None:
        opening.nixl.gpu_index = remote.gpu_index


def remote_memory(memory: transfer_pb2.NixlMemory, layout: KVLayout) -> RemoteMemory:
    """The sender's pool, whose pages have `layout`."""
    gpu_index = memory.gpu_index if memory.HasField("gpu_index") else None
    return RemoteMemory(
        memory.agent_metadata, memory.base_address, memory.num_blocks, layout.bytes_per_block, gpu_index
    )


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
    place = shipped_place(shipped, layout)
    remote = remote_memory(memory, layout)
    offset, length = place.first_layer * layout.bytes_per_layer, place.num_layers * layout.bytes_per_layer
    ranges = [(block * layout.bytes_per_block + offset, length) for block in shipped.source_blocks]
    return await reader.read(remote, ranges, crc=shipped.pages.crc32c, timeout_s=timeout_s)


def shipped_place(shipped: transfer_pb2.Shipped, layout: KVLayout) -> FramePlace:
    """Where pages that are to be read belong. Raises TransferRefused where a frame does not hold together."""
    place = wire.place_of(shipped.pages)
    if len(shipped.source_blocks) != place.num_blocks:
        raise TransferRefused("frame", f"{place.num_blocks} blocks, and {len(shipped.source_blocks)} places")
    if place.first_layer + place.num_layers > layout.num_layers:
        raise TransferRefused("range", f"layers up to {place.first_layer + place.num_layers}")
    return place
