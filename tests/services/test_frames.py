"""Frames: every byte of every block travels once, in pieces of bounded size, and arrives where it belongs."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.convert import PageConverter
from baton_kv_transfer.pages.frames import check, checksum, frame_places, num_payload_bytes, views
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
    places = list(frame_places(layout, FramePlace(first_block, num_blocks, 0, num_layers), target))
    source, target_store = BytesPages(layout, 16), BytesPages(layout, 16)
    source.memory[:] = bytes(index * 13 % 251 for index in range(len(source.memory)))
    # The request's table differs between the servers.
    sent = [(5 * index + 3) % 16 for index in range(first_block + num_blocks)]
    received = [(7 * index + 1) % 16 for index in range(first_block + num_blocks)]
    written: set[tuple[int, int]] = set()
    for place in places:
        span = slice(place.first_block, place.first_block + place.num_blocks)
        parts = views(source, sent[span], place)
        num_bytes = num_payload_bytes(layout, place)
        assert num_bytes <= max(target, layout.bytes_per_layer)
        head = wire.pages_message(place, checksum(parts))
        frame = wire.decode(wire.encode_pages(b"t" * 16, 7, head, parts, num_bytes))
        assert wire.place_of(frame.message.pages) == place
        check(frame.payload, frame.message.pages.crc32c, place, layout)
        PageConverter(layout, layout).write(
            target_store, received, 0, len(received) * block_size, place, frame.payload
        )
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


MIB = 1 << 20


def test_small_pages_share_frames_and_large_ones_are_split() -> None:
    small = KVLayout(16, 2, 1, 64, "bfloat16")  # 8 KiB
    pages = FramePlace(2, 200, 0, 2)
    assert list(frame_places(small, pages, MIB)) == [FramePlace(2, 128, 0, 2), FramePlace(130, 72, 0, 2)]
    assert list(frame_places(small, FramePlace(2, 200, 1, 1), MIB)) == [FramePlace(2, 200, 1, 1)]
    large = KVLayout(16, 5, 8, 1024, "bfloat16")  # 512 KiB a layer
    assert list(frame_places(large, FramePlace(0, 1, 0, 5), MIB)) == [
        FramePlace(0, 1, 0, 2),
        FramePlace(0, 1, 2, 2),
        FramePlace(0, 1, 4, 1),
    ]


@given(at=st.integers(0, 127), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(at: int, bit: int) -> None:
    layout, place = fake_layout(), FramePlace(0, 1, 0, 2)
    parts = views(BytesPages(layout, 1), [0], place)
    payload = bytearray(b"".join(parts))
    payload[at] ^= 1 << bit
    with pytest.raises(TransferRefused) as caught:
        check(memoryview(payload), checksum(parts), place, layout)
    assert caught.value.reason == "checksum"


@given(payload=st.binary(max_size=300), numbers=st.tuples(*[st.integers(0, 2**32 - 1)] * 5))
def test_a_frame_by_hand_is_the_frame_of_the_stubs(payload: bytes, numbers: tuple[int, ...]) -> None:
    *place, crc = numbers
    by_hand = wire.encode_pages(
        b"t" * 16, 2**64 - 1, wire.pages_message(FramePlace(*place), crc), [memoryview(payload)], len(payload)
    )
    by_stub = transfer_pb2.TransferFrame.FromString(by_hand)
    assert by_stub.pages.payload == payload
    for encoded in (by_hand, by_stub.SerializeToString()):
        frame = wire.decode(encoded)
        assert frame.payload == payload
        frame.message.pages.payload = payload
        assert frame.message == by_stub


@given(wire_bytes=st.binary(max_size=80))
def test_no_bytes_do_more_than_be_refused(wire_bytes: bytes) -> None:
    with contextlib.suppress(TransferRefused):
        wire.decode(wire_bytes)


@given(cut=st.integers(0, 195))
def test_a_frame_cut_short_is_refused_or_lacks_pages(cut: int) -> None:
    head = wire.pages_message(FramePlace(1, 2, 3, 4), 5)
    whole = wire.encode_pages(b"t" * 16, 1, head, [memoryview(bytes(150))], 150)
    assert len(whole) == 196
    with contextlib.suppress(TransferRefused):
        assert not wire.decode(whole[:cut]).message.HasField("pages")
