"""A worker of this version works together with one of version 1: the recorded session that it spoke."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from baton.core.reservation import FramePlace, Reservation, ReservationTable, TransferDeadlines
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.sender import TransferSender
from baton_kv_transfer.transfers.inbound import InboundTransfers
from baton_kv_transfer.transfers.inbound_call import InboundCall
from baton_kv_transfer.transports.registry import SendingTransports
from tests.services.fake_engine import BytesPages, fake_layout

RECORDED = json.loads((Path(__file__).parent / "version_1_transfer.json").read_text())
FRAMES = [base64.b64decode(frame) for frame in RECORDED["frames"]]
PAGES = base64.b64decode(RECORDED["pages"])


def recorded_ticket() -> Ticket:
    return codec.ticket_from_proto(transfer_pb2.Ticket.FromString(base64.b64decode(RECORDED["ticket"])))


class Owner:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.first_tokens: dict[int, int] = {}

    def deadline_changed(self, reservation: Reservation) -> None: ...

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        self.first_tokens = first_tokens

    def withdrawn(self, reservation: Reservation) -> None: ...

    def writer_gone(self, reservation: Reservation) -> None: ...


def test_the_frames_of_a_version_1_prefill_server_are_taken() -> None:
    ticket, store, owner = recorded_ticket(), BytesPages(fake_layout(), 8), Owner()
    table = ReservationTable(ticket.epoch)
    table.add(
        Reservation(
            ticket.transfer_id,
            ticket.request_id,
            block_table=(0, 6, 1, 3),
            first_block=ticket.first_block,
            num_tokens=14,
            heads=range(1),
            deadlines=TransferDeadlines(),
            now=0.0,
        )
    )
    call = InboundCall(InboundTransfers(table, store, owner, TransferStats()))
    for frame in FRAMES:
        call.take(wire.decode(frame), 1.0)
    assert owner.first_tokens == {0: 42}
    assert b"".join(store.page(block, 0, 2) for block in (6, 1, 3)) == PAGES
    assert transfer_pb2.PushResult(bytes_received=call.result()).SerializeToString() == base64.b64decode(
        RECORDED["result"]
    )


async def test_a_version_1_decode_server_gets_the_frames_that_it_knows(tmp_path: Path) -> None:
    received: list[bytes] = []

    async def push(frames: AsyncIterator[bytes], context: object) -> bytes:
        received.extend([frame async for frame in frames])
        return base64.b64decode(RECORDED["result"])

    server = grpc.aio.server()
    handler = grpc.stream_unary_rpc_method_handler(push)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("baton.v1.Transfer", {"Push": handler}),)
    )
    address = f"unix:{tmp_path}/decode"
    server.add_insecure_port(address)
    await server.start()
    store = BytesPages(fake_layout(), 8)
    for index, block in enumerate((5, 2, 7)):
        size = store.layout.bytes_per_block
        store.page(block, 0, 2)[:] = PAGES[index * size : (index + 1) * size]
    sender = TransferSender(store, "", TransferStats(), SendingTransports(store, "grpc"), stall_timeout_s=5.0)
    old = recorded_ticket()
    ticket = Ticket(
        transfer_id=old.transfer_id,
        epoch=old.epoch,
        request_id=old.request_id,
        address=address,
        first_block=old.first_block,
        num_blocks=old.num_blocks,
        layout=old.layout,
        protocol_version=old.protocol_version,
    )
    transfer = sender.begin(ticket, lambda blocks: None)
    transfer.send_pages(FramePlace(1, 2, 0, 2), (5, 2))
    transfer.send_pages(FramePlace(3, 1, 0, 2), (7,))
    transfer.commit([42], [])
    await transfer.run()
    await sender.close()
    await server.stop(None)
    # Field by field: protobuf's bytes may be in another order. A version 1 stub reads what it knows.
    assert [_known(frame) for frame in received] == [_known(frame) for frame in FRAMES]


def _known(frame: bytes) -> transfer_pb2.TransferFrame:
    message = transfer_pb2.TransferFrame.FromString(frame)
    if message.HasField("open"):
        # New in version 2, and harmless: version 1 skips fields that it does not know.
        message.open.layout.ClearField("total_kv_heads")
    return message
