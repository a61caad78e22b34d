"""Every single bit of a transfer, changed on its way: refused, or without effect."""

import sys
from dataclasses import replace

import pytest

from baton.core.errors import TransferRefused
from baton.core.kv_layout import FLOAT8, KVLayout
from baton.core.reservation import FramePlace, Reservation, ReservationTable, TransferDeadlines
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import checksum, num_payload_bytes, views
from baton_kv_transfer.transfers.inbound import InboundTransfers
from baton_kv_transfer.transfers.inbound_call import InboundCall
from baton_kv_transfer.transfers.outbound import OutboundTransfer
from tests.services.fake_engine import BytesPages, fake_layout

LAYOUT = fake_layout()
TICKET = Ticket(
    transfer_id=bytes(range(16)),
    epoch=0x0123456789ABCDEF,
    request_id="request",
    address="unix:/nowhere",
    first_block=1,
    num_blocks=4,
    layout=LAYOUT,
    protocol_version=2,
    num_tokens=14,
)
BLOCK_TABLE = (0, 6, 1, 3)
PLACES = (FramePlace(1, 2, 0, 2), FramePlace(3, 1, 0, 1), FramePlace(3, 1, 1, 1))
NUM_BLOCKS = 8


class Decode:
    """The receiving side, and what it has been told."""

    def __init__(self) -> None:
        self.store = BytesPages(LAYOUT, NUM_BLOCKS)
        self.first_tokens: dict[int, int] = {}
        self.is_withdrawn = False

    def deadline_changed(self, reservation: Reservation) -> None: ...

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        self.first_tokens = first_tokens

    def withdrawn(self, reservation: Reservation) -> None:
        self.is_withdrawn = True

    def writer_gone(self, reservation: Reservation) -> None: ...

    def take(self, frames: list[bytes]) -> bool:
        """Returns whether the call ended well, as prefill sees it."""
        table = ReservationTable(TICKET.epoch)
        reservation = Reservation(
            TICKET.transfer_id,
            TICKET.request_id,
            block_table=BLOCK_TABLE,
            first_block=TICKET.first_block,
            num_tokens=TICKET.num_tokens,
            heads=range(LAYOUT.num_kv_heads),
            deadlines=TransferDeadlines(),
            now=0.0,
        )
        table.add(reservation)
        call = InboundCall(InboundTransfers(table, self.store, self, TransferStats()))
        try:
            for frame in frames:
                call.take(wire.decode(frame), 1.0)
                if call.is_complete:
                    break
            call.no_more_frames()
            call.result()
        except TransferRefused:
            return False
        finally:
            call.end(2.0)
        return call.is_decided


def sent() -> list[bytes]:
    """A transfer's frames, as prefill makes them."""
    source = BytesPages(LAYOUT, NUM_BLOCKS)
    source.memory[:] = bytes(index * 7 % 251 for index in range(len(source.memory)))
    outbound = OutboundTransfer(TICKET, lambda blocks: None, LAYOUT.scales)
    opening = outbound.frame()
    opening.open.layout.CopyFrom(codec.layout_to_proto(LAYOUT))
    opening.open.protocol_version = TICKET.protocol_version
    opening.open.transport = "grpc"
    frames = [opening.SerializeToString()]
    for place in PLACES:
        parts = views(source, range(place.first_block, place.first_block + place.num_blocks), place)
        head = wire.pages_message(place, checksum(parts))
        num_bytes = num_payload_bytes(LAYOUT, place)
        frames.append(wire.encode_pages(TICKET.transfer_id, TICKET.epoch, head, parts, num_bytes))
    outbound.commit([5, 600, 7], [1])
    last = outbound.next()
    assert isinstance(last, transfer_pb2.TransferFrame)
    return [*frames, last.SerializeToString()]


FRAMES = sent()


@pytest.mark.parametrize("index", range(len(FRAMES)), ids=["open", "pages 1", "pages 2", "pages 3", "commit"])
def test_one_bit(index: int) -> None:
    right = Decode()
    assert right.take(FRAMES)
    assert right.first_tokens == {0: 5, 2: 7}
    frame = FRAMES[index]
    for bit in range(8 * len(frame)):
        changed = bytearray(frame)
        changed[bit // 8] ^= 1 << bit % 8
        decode = Decode()
        if decode.take([*FRAMES[:index], bytes(changed), *FRAMES[index + 1 :]]):
            assert decode.first_tokens == right.first_tokens, f"bit {bit}"
            assert decode.store.memory == right.store.memory, f"bit {bit}"
        else:
            assert not decode.first_tokens, f"bit {bit}: decode goes on, prefill does not know"
        assert not decode.is_withdrawn, f"bit {bit}"


@pytest.mark.parametrize("index", range(len(FRAMES)), ids=["open", "pages 1", "pages 2", "pages 3", "commit"])
def test_one_bit_where_pages_have_scales(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales come in the open, and every number of a page is multiplied by one."""
    scaled = KVLayout(4, 2, 1, 8, FLOAT8, scales=(0.5, 0.25, 2.0, 0.125))
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "LAYOUT", scaled)
    monkeypatch.setattr(this, "TICKET", replace(TICKET, layout=scaled))
    monkeypatch.setattr(this, "FRAMES", sent())
    test_one_bit(index)
