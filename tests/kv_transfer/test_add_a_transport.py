"""docs/how-to/add-a-transport.md is true: a module and a row of the registry are a transport."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from baton.config import KV_TRANSPORTS
from baton.core.errors import StartupError, TransferRefused
from baton.core.reservation import FramePlace, Reservation, ReservationTable, TransferDeadlines
from baton.core.ticket import Ticket
from baton.core.transfer_stats import TransferReport, TransferStats
from baton.rpc import codec
from baton.rpc.server import RpcServer
from baton_kv_transfer import peer, receiver, sender
from baton_kv_transfer.receiver import TransferReceiver
from baton_kv_transfer.sender import OutgoingTransfer, TransferSender
from baton_kv_transfer.transfers.inbound import InboundTransfers
from baton_kv_transfer.transfers.pace import InboundPace
from baton_kv_transfer.transports import registry
from baton_kv_transfer.transports.base import PushCall, ReceivingWorker, Route, RouteRequest
from baton_kv_transfer.transports.registry import ReceivingTransports, Row, SendingTransports
from tests.kv_transfer import in_process
from tests.services.cluster import until
from tests.services.fake_engine import BytesPages, fake_layout

IN_PROCESS = Row("in_process", "tests.kv_transfer.in_process")
PREFILL_BLOCKS, DECODE_BLOCKS = (6, 2, 7, 0, 3), (1, 5, 4, 0, 6)
NUM_TOKENS = 19  # of five blocks
DEADLINE_S = 10.0


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROWS", (IN_PROCESS, *registry.ROWS))


@dataclass
class Owner:
    """Implements baton_kv_transfer.transfers.inbound.TransferOwner: notes what was committed."""

    first_tokens: list[dict[int, int]] = field(default_factory=list)

    def deadline_changed(self, reservation: Reservation) -> None: ...

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        self.first_tokens.append(first_tokens)

    def withdrawn(self, reservation: Reservation) -> None: ...

    def writer_gone(self, reservation: Reservation) -> None: ...


def send(transfer: OutgoingTransfer) -> None:
    transfer.send_pages(FramePlace(0, 3, 0, 2), PREFILL_BLOCKS[:3])
    transfer.send_pages(FramePlace(3, 2, 0, 2), PREFILL_BLOCKS[3:])
    transfer.commit([42], [])


class Pair:
    """A prefill and a decode server's transfers, and real gRPC between them."""

    def __init__(self, address: str, asked: str | None) -> None:
        self.address = address
        self.owner, self.table, self.num_transfers = Owner(), ReservationTable(7), 0
        self.prefill, self.decode = (BytesPages(fake_layout(), 8) for _ in range(2))
        self.prefill.memory[:] = bytes(index * 7 % 251 for index in range(len(self.prefill.memory)))
        self.sending, self.calls = SendingTransports(self.prefill, asked), list[PushCall]()
        self._route, self.sending.route = self.sending.route, self.route  # type: ignore[method-assign]
        self.receiving = ReceivingTransports(self.decode)
        self.sender = TransferSender(
            self.prefill, "", TransferStats(), self.sending, asked_transport=asked, stall_timeout_s=5.0
        )
        stats = TransferStats()
        inbound = InboundTransfers(self.table, self.decode, self.owner, stats, self.receiving.writer)
        pace = InboundPace(lambda: False, 1)
        self.worker = ReceivingWorker(inbound, time.monotonic, stats, pace, "127.0.0.1", 5.0)

    def route(self, name: str, request: RouteRequest) -> Route:
        self.calls = request.calls
        return self._route(name, request)

    def ticket(self) -> Ticket:
        """Of a new reservation for the same pages."""
        self.num_transfers += 1
        transfer_id = self.num_transfers.to_bytes(16, "big")
        self.table.add(
            Reservation(
                transfer_id,
                "request",
                block_table=DECODE_BLOCKS,
                first_block=0,
                num_tokens=NUM_TOKENS,
                heads=range(1),
                deadlines=TransferDeadlines(),
                now=time.monotonic(),
            )
        )
        return Ticket(
            transfer_id=transfer_id,
            epoch=7,
            request_id="request",
            address=self.address,
            first_block=0,
            num_blocks=len(DECODE_BLOCKS),
            layout=self.decode.layout,
            protocol_version=codec.PROTOCOL_VERSION,
            num_tokens=NUM_TOKENS,
            transports=self.receiving.offer,
        )

    async def transfer(self) -> TransferReport:
        """All pages of one prompt, in two parts."""
        released: list[int] = []
        transfer = self.sender.begin(self.ticket(), released.extend)
        send(transfer)
        try:
            return await asyncio.wait_for(transfer.run(), DEADLINE_S)
        finally:
            assert sorted(released) == sorted(PREFILL_BLOCKS)

    async def refused(self) -> str:
        """Why a transfer is refused whose pages come after it: gRPC loses the reason of those under way."""
        transfer = self.sender.begin(self.ticket(), lambda blocks: None)
        running = asyncio.create_task(transfer.run())
        await until(lambda: self.calls and self.calls[0].done())
        send(transfer)
        with pytest.raises(TransferRefused) as refused:
            await running
        return refused.value.reason

    def brought(self) -> bool:
        """Whether every byte is where it belongs."""
        pages = zip(PREFILL_BLOCKS, DECODE_BLOCKS, strict=True)
        return all(self.prefill.page(mine, 0, 2) == self.decode.page(theirs, 0, 2) for mine, theirs in pages)


@asynccontextmanager
async def pair(folder: Path, asked: str | None = None) -> AsyncIterator[Pair]:
    made, server = Pair(f"unix:{folder}/decode", asked), RpcServer()
    TransferReceiver(made.worker, made.receiving).add_to(server.grpc)
    await server.start(made.address, (receiver.SERVICE,), "--listen")
    try:
        yield made
    finally:
        await made.sender.close()
        await server.grpc.stop(None)
        await made.receiving.close()
    assert not in_process.pools
    assert not in_process.intakes
    assert in_process.num_landings == 0


@pytest.mark.parametrize("asked", [None, "in_process"])
async def test_pages_travel_by_a_new_transport(tmp_path: Path, asked: str | None) -> None:
    async with pair(tmp_path, asked) as made:
        assert not made.brought()
        report = await made.transfer()
        assert made.brought()
        assert made.owner.first_tokens == [{0: 42}]
        num_bytes = len(DECODE_BLOCKS) * made.decode.layout.bytes_per_block
        assert (report.transport, report.num_bytes) == ("in_process", num_bytes)
        assert made.worker.stats.transports["in_process"].num_bytes == num_bytes
        assert made.worker.stats.outcomes == {"committed": 1}


async def test_its_own_failures_are_left_alone_for_a_while(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        in_process.pools.clear()
        assert await made.refused() == "in_process"
        assert (await made.transfer()).transport != "in_process"
        assert made.brought()


async def test_a_wrong_byte_reaches_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(tmp_path) as made:
        before = bytes(made.decode.memory)
        monkeypatch.setattr(in_process, "checksum", lambda parts: 0)
        with pytest.raises(TransferRefused, match="pages were not what") as refused:
            await made.transfer()
        assert refused.value.reason == "checksum"
        assert bytes(made.decode.memory) == before


async def test_servers_of_two_hosts_use_another(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        made.receiving.offer = replace(
            made.receiving.offer, host_id="elsewhere", names=("grpc", "in_process")
        )
        assert (await made.transfer()).transport == "grpc"
        assert made.brought()


async def test_a_decode_server_without_it_refuses_it(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        del made.receiving._sides["in_process"]  # and yet its ticket says that it has it
        assert await made.refused() == "transport"
        assert "in_process" not in made.worker.stats.transports
        assert (await made.transfer()).transport != "in_process"


def test_what_it_lacks_is_said() -> None:
    store = BytesPages(fake_layout(), 8)
    store.device_pages = object()  # type: ignore[assignment]
    assert in_process.TRANSPORT.lack(store) is not None
    with pytest.raises(StartupError, match="KV transport cuda_ipc is for pages on a GPU: use --device cuda"):
        SendingTransports(BytesPages(fake_layout(), 8), "cuda_ipc")


def test_users_know_the_transports_of_the_registry() -> None:
    names = {row.name for row in registry.ROWS if row is not IN_PROCESS}
    assert set(KV_TRANSPORTS) == {"auto", *names}
    assert registry.ROWS[-1].name == "grpc"  # which is always there


@pytest.mark.parametrize("module", [sender, peer, receiver])
def test_the_top_floor_names_no_transport(module: object) -> None:
    source = Path(module.__file__).read_text()  # type: ignore[attr-defined]
    assert not [row.name for row in registry.ROWS if f'"{row.name}"' in source]
