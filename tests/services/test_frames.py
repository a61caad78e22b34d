"""Frames: every byte of every block travels once, in pieces of bounded size, and arrives where it belongs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.v1 import transfer_pb2
from kv_transfer import frames
from kv_transfer.frames import FramePlace, check, frame_places, pack, unpack
from tests.services.fake_engine import BytesPages, fake_layout


@settings(max_examples=60, deadline=None)
@given(
    num_layers=st.integers(1, 7),
    block_size=st.sampled_from([1, 4, 16]),
    first_block=st.integers(0, 3),
    num_blocks=st.integers(0, 9),
    target=st.integers(1, 2_000),
)
def test_pages_survive_the_way(
    num_layers: int, block_size: int, first_block: int, num_blocks: int, target: int
) -> None:
    """`target` takes frames from many blocks each to one layer of one block each."""
    layout = fake_layout(block_size, num_layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "TARGET_FRAME_BYTES", target)
        places = list(frame_places(layout, first_block, num_blocks))
    source, target_store = BytesPages(layout, 16), BytesPages(layout, 16)
    source.memory[:] = bytes(index * 13 % 251 for index in range(len(source.memory)))
    # The request's table differs between the servers.
    sent = [(5 * index + 3) % 16 for index in range(first_block + num_blocks)]
    received = [(7 * index + 1) % 16 for index in range(first_block + num_blocks)]
    written: set[tuple[int, int]] = set()
    for place in places:
        span = slice(place.first_block, place.first_block + place.num_blocks)
        wire = pack(source, sent[span], place).SerializeToString()
        pages = transfer_pb2.Pages.FromString(wire)
        assert len(pages.payload) <= max(target, layout.bytes_per_layer)
        unpack(target_store, received[span], pages, check(pages, layout))
        cells = {
            (block, layer)
            for block in range(span.start, span.stop)
            for layer in range(place.first_layer, place.first_layer + place.num_layers)
        }
        assert not cells & written
        written |= cells
    wanted = range(first_block, first_block + num_blocks)
    assert written == {(block, layer) for block in wanted for layer in range(num_layers)}
    untouched = BytesPages(layout, 1).page(0, 0, num_layers)
    for block in range(16):
        index = next((index for index in wanted if received[index] == block), None)
        there = target_store.page(block, 0, num_layers)
        assert there == (untouched if index is None else source.page(sent[index], 0, num_layers))


def test_small_pages_share_frames_and_large_ones_are_split() -> None:
    small = KVLayout(16, 2, 1, 64, "bfloat16")  # 8 KiB
    assert list(frame_places(small, 2, 200)) == [FramePlace(2, 128, 0, 2), FramePlace(130, 72, 0, 2)]
    large = KVLayout(16, 5, 8, 1024, "bfloat16")  # 512 KiB a layer
    assert list(frame_places(large, 0, 1)) == [
        FramePlace(0, 1, 0, 2),
        FramePlace(0, 1, 2, 2),
        FramePlace(0, 1, 4, 1),
    ]


@given(at=st.integers(0, 127), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(at: int, bit: int) -> None:
    layout = fake_layout()
    pages = pack(BytesPages(layout, 1), [0], FramePlace(0, 1, 0, 2))
    payload = bytearray(pages.payload)
    payload[at] ^= 1 << bit
    pages.payload = bytes(payload)
    with pytest.raises(TransferRefused) as caught:
        check(pages, layout)
    assert caught.value.reason == "checksum"
