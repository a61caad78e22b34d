"""Pages that leave, cut into frames of bounded size, and each frame's checksum. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace

# Staging buffers of this size keep messages few, and are cheap to have.
_SHORTEST_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class PagesToSend:
    """Pages that nobody writes any more; `blocks` are those of the place, in order, in this server's pool."""

    place: FramePlace
    blocks: tuple[int, ...]


def frame_places(layout: KVLayout, pages: FramePlace, target_bytes: int) -> Iterator[FramePlace]:
    """Cut `pages` into frames of at most `target_bytes`, or one layer of one block where that is larger.

    A frame is several blocks, or where one is too large already, several layers of one.
    """
    bytes_per_block = pages.num_layers * layout.bytes_per_layer
    end_block, end_layer = pages.first_block + pages.num_blocks, pages.first_layer + pages.num_layers
    if bytes_per_block <= target_bytes:
        step = target_bytes // bytes_per_block
        for start in range(pages.first_block, end_block, step):
            count = min(step, end_block - start)
            yield FramePlace(start, count, pages.first_layer, pages.num_layers)
        return
    step = max(1, target_bytes // layout.bytes_per_layer)
    for block in range(pages.first_block, end_block):
        for layer in range(pages.first_layer, end_layer, step):
            yield FramePlace(block, 1, layer, min(step, end_layer - layer))


def views(store: PageStore, blocks: Sequence[int], place: FramePlace) -> list[memoryview]:
    """The bytes of a place, in order, where they lie in the pool; `blocks` are the place's pages."""
    return [store.page(block, place.first_layer, place.num_layers) for block in blocks]


def checksum(parts: Sequence[memoryview]) -> int:
    """crc32c (RFC 3720, appendix B.4) of all parts as one."""
    value = 0
    for part in parts:
        value = crc32c(part, value)
    return value


def longest_message(layout: KVLayout) -> int:
    """Bytes of the longest message or read: 256 blocks, a long prompt, are at most 16 messages."""
    return max(_SHORTEST_LIMIT, 16 * layout.bytes_per_block)


def copy_into(target: memoryview, parts: Sequence[memoryview]) -> None:
    """Put parts one after another; other threads go on meanwhile."""
    array, start = np.frombuffer(target, np.uint8), 0
    for part in parts:
        np.copyto(array[start : start + len(part)], np.frombuffer(part, np.uint8))
        start += len(part)


def num_payload_bytes(layout: KVLayout, place: FramePlace) -> int:
    """Bytes of a place's pages."""
    return place.num_blocks * place.num_layers * layout.bytes_per_layer


def check(payload: memoryview, expected: int, place: FramePlace, layout: KVLayout) -> None:
    """Raises TransferRefused unless length and checksum of a payload are right."""
    num_bytes = num_payload_bytes(layout, place)
    if len(payload) != num_bytes:
        raise TransferRefused("length", f"frame of {len(payload)} bytes where its place has {num_bytes}")
    if crc32c(payload) != expected:
        raise TransferRefused("checksum", f"frame for block {place.first_block} arrived corrupted")
