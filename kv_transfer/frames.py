"""Pages cut into frames of about one mebibyte, each with its place and checksum, and put back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crc32c import crc32c

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.ports import PageStore
from baton.v1 import transfer_pb2

TARGET_FRAME_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FramePlace:
    """Where a frame's payload belongs: some layers of some consecutive blocks of a request's table."""

    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int


def frame_places(layout: KVLayout, first_block: int, num_blocks: int) -> Iterator[FramePlace]:
    """Cut blocks into frames: several whole blocks each, or several layers of one block where it is large."""
    if layout.bytes_per_block <= TARGET_FRAME_BYTES:
        step = TARGET_FRAME_BYTES // layout.bytes_per_block
        for start in range(first_block, first_block + num_blocks, step):
            count = min(step, first_block + num_blocks - start)
            yield FramePlace(start, count, 0, layout.num_layers)
        return
    step = max(1, TARGET_FRAME_BYTES // layout.bytes_per_layer)
    for block in range(first_block, first_block + num_blocks):
        for layer in range(0, layout.num_layers, step):
            yield FramePlace(block, 1, layer, min(step, layout.num_layers - layer))


def pack(store: PageStore, blocks: Sequence[int], place: FramePlace) -> transfer_pb2.Pages:
    """Copy the pages `blocks`, which are the place's blocks in order, out of the pool."""
    payload = b"".join(store.page(block, place.first_layer, place.num_layers) for block in blocks)
    return transfer_pb2.Pages(
        first_block=place.first_block,
        num_blocks=place.num_blocks,
        first_layer=place.first_layer,
        num_layers=place.num_layers,
        crc32c=crc32c(payload),
        payload=payload,
    )


def check(pages: transfer_pb2.Pages, layout: KVLayout) -> memoryview:
    """The payload, once length and checksum are right. Raises TransferRefused before anything is written."""
    payload = pages.payload
    expected = pages.num_blocks * pages.num_layers * layout.bytes_per_layer
    if len(payload) != expected:
        raise TransferRefused("length", f"frame of {len(payload)} bytes where its place has {expected}")
    if crc32c(payload) != pages.crc32c:
        raise TransferRefused("checksum", f"frame for block {pages.first_block} arrived corrupted")
    return memoryview(payload)


def unpack(store: PageStore, blocks: Sequence[int], pages: transfer_pb2.Pages, payload: memoryview) -> None:
    """Copy a checked payload into the pages `blocks`, which the transfer is the one writer of."""
    size = pages.num_layers * store.layout.bytes_per_layer
    for index, block in enumerate(blocks):
        page = store.page(block, pages.first_layer, pages.num_layers)
        page[:] = payload[index * size : (index + 1) * size]
