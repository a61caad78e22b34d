"""The sending side alone: a decode server that can't be reached costs no page."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from baton.core.errors import TransferRefused
from baton.rpc.ticket import Ticket
from kv_transfer import grpc_sender
from kv_transfer.grpc_sender import GrpcSender, OutgoingTransfer
from kv_transfer.stats import TransferStats
from tests.services.fake_engine import BytesPages, fake_layout


async def test_every_page_comes_back_once_where_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_sender, "CONNECT_TIMEOUT_S", 0.05)
    layout, stats = fake_layout(), TransferStats()
    sender = GrpcSender(BytesPages(layout, 8), "", stats)
    released: list[int] = []
    ticket = Ticket(b"t" * 16, 1, "request", f"unix:{tmp_path}/nobody", 0, 5, layout)
    transfer = sender.begin(ticket, released.extend)
    transfer.send_pages(0, (3, 4))
    transfer.send_pages(2, (7,))
    with pytest.raises(TransferRefused, match="nobody can't be reached"):
        await transfer.run()
    assert sorted(released) == [3, 4, 7]
    transfer.send_pages(3, (1, 2))  # what the engine had under way
    assert sorted(released) == [1, 2, 3, 4, 7]
    assert stats.outcomes == {"refused": 1}
    assert stats.num_bytes == 0
    await sender.close()


async def test_pages_of_another_shape_are_not_sent() -> None:
    sender = GrpcSender(BytesPages(fake_layout(), 8), "", TransferStats())
    ticket = Ticket(b"t" * 16, 1, "request", "unix:/nowhere", 0, 5, fake_layout(block_size=16))
    with pytest.raises(TransferRefused, match="block_size"):
        sender.begin(ticket, lambda blocks: None)


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
    layout, stats = fake_layout(), TransferStats()
    released: list[int] = []
    call = SlowCall()
    ticket = Ticket(b"t" * 16, 1, "request", "unix:/nowhere", 0, 5, layout)
    transfer = OutgoingTransfer(
        ticket, BytesPages(layout, 8), SimpleNamespace(Push=lambda **_: call), (), released.extend, stats
    )
    transfer.send_pages(0, (3,))
    task = asyncio.create_task(transfer.run())
    await asyncio.sleep(0)
    call.taken.set_result(None)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,), timeout=1)
    assert task.cancelled()
    assert released == [3]
