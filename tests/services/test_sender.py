"""The sending side alone: a decode server that can't be reached costs no page."""

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from baton.core.errors import TransferRefused
from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferStats
from baton_kv_transfer import sender as sender_module
from baton_kv_transfer.peer import Peer
from baton_kv_transfer.sender import OutgoingTransfer, TransferSender
from baton_kv_transfer.transfers.outbound import OutboundTransfer
from baton_kv_transfer.transports.choice import Choice
from baton_kv_transfer.transports.registry import SendingTransports
from tests.services.fake_engine import BytesPages, fake_layout


def ticket_to(address: str, layout: KVLayout | None = None) -> Ticket:
    return Ticket(
        transfer_id=b"t" * 16,
        epoch=1,
        request_id="request",
        address=address,
        first_block=0,
        num_blocks=5,
        layout=layout or fake_layout(),
        protocol_version=2,
        num_tokens=20,
    )


def sender(asked_transport: str | None = None) -> TransferSender:
    pages = BytesPages(fake_layout(), 8)
    return TransferSender(
        pages,
        "",
        TransferStats(),
        SendingTransports(pages, "grpc"),
        asked_transport=asked_transport,
        stall_timeout_s=5.0,
    )


async def test_every_page_comes_back_once_where_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "CONNECT_TIMEOUT_S", 0.05)
    made = sender()
    released: list[int] = []
    transfer = made.begin(ticket_to(f"unix:{tmp_path}/nobody"), released.extend)
    transfer.send_pages(FramePlace(0, 2, 0, 2), (3, 4))
    transfer.send_pages(FramePlace(2, 1, 0, 2), (7,))
    with pytest.raises(TransferRefused, match="nobody can't be reached"):
        await transfer.run()
    assert sorted(released) == [3, 4, 7]
    transfer.send_pages(FramePlace(3, 2, 0, 2), (1, 2))  # what the engine had under way
    assert sorted(released) == [1, 2, 3, 4, 7]
    assert made.stats.outcomes == {"refused": 1}
    assert made.stats.num_bytes == 0
    await made.close()


async def test_connections_where_a_transfer_failed_are_left_to_those_that_they_have() -> None:
    peer = Peer("unix:/nowhere", ())

    async def fail() -> None:
        async with peer.line():
            raise TransferRefused("push", "it failed")

    async with peer.line() as first:
        assert peer.line() is first
        with pytest.raises(TransferRefused):
            await fail()
        second = peer.line()
        assert second is not first
        assert first.channels[0].get_state() is not grpc.ChannelConnectivity.SHUTDOWN
    assert first.channels[0].get_state() is grpc.ChannelConnectivity.SHUTDOWN  # once the last one has ended
    with pytest.raises(asyncio.CancelledError):
        async with second:
            raise asyncio.CancelledError
    assert peer.line() is second  # an abort is no failure
    await peer.close()


async def test_pages_that_decode_cannot_convert_are_not_sent() -> None:
    with pytest.raises(TransferRefused, match="num_layers"):
        sender().begin(ticket_to("unix:/nowhere", fake_layout(num_layers=3)), lambda blocks: None)


async def test_a_decode_server_of_an_older_protocol_is_refused_in_words() -> None:
    ticket = ticket_to("unix:/nowhere")
    with pytest.raises(TransferRefused, match="speaks protocol version 1, this prefill server 2") as refused:
        sender().begin(replace(ticket, protocol_version=1), lambda blocks: None)
    assert refused.value.reason == "version"
    sender().begin(replace(ticket, protocol_version=3), lambda blocks: None)  # it may speak this one too


async def test_a_transport_that_decode_lacks_is_not_silently_replaced() -> None:
    with pytest.raises(TransferRefused, match="nixl was asked for, but this prefill server has only grpc"):
        sender("nixl").begin(ticket_to("unix:/nowhere"), lambda blocks: None)


class SlowCall:
    """A Push call whose first frame is taken when the test says so."""

    def __init__(self) -> None:
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def write(self, frame: object) -> None:
        await self.taken

    def cancel(self) -> None: ...


@pytest.mark.parametrize("num_turns", range(4))
async def test_an_abort_is_not_lost_as_a_frame_is_taken(num_turns: int) -> None:
    """asyncio.wait_for of Python 3.11 would lose it, and the transfer would hold its pages for ever."""
    released: list[int] = []
    call = SlowCall()
    outbound = OutboundTransfer(ticket_to("unix:/nowhere"), released.extend)
    line = SimpleNamespace(push=lambda stream: call)
    peer = SimpleNamespace(line=lambda: nullcontext(line), choose=lambda *_: Choice("grpc", "test"))
    transfer = OutgoingTransfer(outbound, sender(), peer)  # type: ignore[arg-type]
    transfer.send_pages(FramePlace(0, 1, 0, 2), (3,))
    task = asyncio.create_task(transfer.run())
    await asyncio.sleep(0)
    call.taken.set_result(None)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,), timeout=1)
    assert task.cancelled()
    assert released == [3]
