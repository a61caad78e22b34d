"""Pages whose writes take a while, as on a device: nobody else gets a page while one of them is under way."""

import random

import pytest

from baton.core.commands import AbortRequest, CommitRequest, EngineCommand, FailureReason
from baton.core.errors import TransferRefused
from baton.core.request import BlocksReserved, EngineRequest
from baton.core.reservation import FramePlace, Reservation, TransferDeadlines, TransferState
from baton.core.sampling import SamplingParams
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.v1 import transfer_pb2
from baton_decode_service.handover import DecodeHandover
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.arrived import Arrived, WhenWritten
from baton_kv_transfer.pages.wire import Frame
from baton_kv_transfer.transfers.inbound_call import InboundCall
from tests.services.fake_engine import BytesPages, fake_layout

LAYOUT = fake_layout()
NUM_BLOCKS = 3
DEADLINES = TransferDeadlines(reserved_s=8.0, receiving_s=8.0, committing_s=6.0, aborting_s=2.0)
NUM_SCHEDULES = 400


class LateWriter:
    """Implements baton_kv_transfer.pages.arrived.PageWriter: writes when the test says so."""

    def __init__(self, store: BytesPages) -> None:
        self.pending: list[tuple[Arrived, WhenWritten]] = []
        self._store = store

    def write(self, arrived: Arrived, when_written: WhenWritten) -> None:
        self.pending.append((arrived, when_written))

    async def room(self) -> None: ...

    def finish(self, index: int, error: Exception | None = None) -> None:
        """One of the writes has ended, in whichever order."""
        arrived, when_written = self.pending.pop(index)
        if error is None:
            fields = (arrived.block_table, arrived.first_token, arrived.num_tokens, arrived.place)
            arrived.converter.write(self._store, *fields, arrived.payload)
        when_written(error)


class Decode:
    """A decode server with one reservation and one call (baton_decode_service.handover.Effects)."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.store = BytesPages(LAYOUT, 8)
        self.source = BytesPages(LAYOUT, NUM_BLOCKS)
        self.source.memory[:] = bytes(index * 7 % 251 for index in range(len(self.source.memory)))
        self.writer = LateWriter(self.store)
        self.submitted: list[EngineCommand] = []
        self.reservation: Reservation
        self.stats = TransferStats()
        self.handover = DecodeHandover(7, self.store, DEADLINES, self.stats, self, self.writer)
        prompt = tuple(range(NUM_BLOCKS * LAYOUT.block_size))
        self.handover.reserve(EngineRequest("request", prompt, b"", (), SamplingParams()))
        self.handover.reserved(BlocksReserved("request", (5, 1, 6), 0))
        self.call = InboundCall(self.handover.inbound)
        self.has_call = True
        opening = self.frame()
        opening.message.open.CopyFrom(
            transfer_pb2.Open(layout=codec.layout_to_proto(LAYOUT), protocol_version=2, transport="cuda_ipc")
        )
        self.call.take(opening, self.clock)

    def submit(self, command: EngineCommand) -> None:
        """Whoever gets the pages now writes them: no copy may be under way."""
        if isinstance(command, AbortRequest | CommitRequest):
            assert not self.writer.pending, f"{command}, and a copy still writes"
        self.submitted.append(command)

    def issue(self, reservation: Reservation) -> None:
        self.reservation = reservation

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None: ...

    def forget(self, request_id: str) -> None: ...

    def new_transfer_id(self) -> bytes:
        return b"t" * 16

    def now(self) -> float:
        return self.clock

    def deadlines_changed(self) -> None: ...

    def frame(self) -> Frame:
        return Frame(transfer_pb2.TransferFrame(transfer_id=b"t" * 16, epoch=7), memoryview(b""))

    def deliver(self, block: int) -> None:
        """One block has come and was checked."""
        assert self.call.writer is not None
        place = FramePlace(block, 1, 0, LAYOUT.num_layers)
        payload = self.source.page(block, 0, LAYOUT.num_layers)
        self.handover.inbound.deliver_checked(self.call.writer, place, payload, self.clock)

    def commit(self) -> None:
        frame = self.frame()
        frame.message.commit.first_tokens.append(5)
        wire.seal(frame.message.commit)
        self.call.take(frame, self.clock)

    def withdraw(self) -> None:
        frame = self.frame()
        frame.message.withdraw.SetInParent()
        self.call.take(frame, self.clock)
        self.end_call()

    def end_call(self) -> None:
        if self.has_call:
            self.has_call = False
            self.call.end(self.clock)

    def wait(self, seconds: float) -> None:
        self.clock += seconds
        self.handover.expire()

    @property
    def is_clean(self) -> bool:
        inbound = self.handover.inbound
        return not (len(self.handover.table) or inbound._open or inbound._writers)


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_any_order_of_copies_and_ends(seed: int) -> None:
    chance, decode = random.Random(seed), Decode()
    blocks = chance.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    is_committed = False
    for _ in range(chance.randrange(3, 25)):
        action = chance.choice(("deliver", "deliver", "written", "written", "commit", "end", "abort", "wait"))
        try:
            if action == "written" and decode.writer.pending:
                fails = chance.random() < 0.05
                index = chance.randrange(len(decode.writer.pending))
                decode.writer.finish(index, RuntimeError("the device is gone") if fails else None)
            elif action == "deliver" and blocks and decode.has_call:
                decode.deliver(blocks.pop())
            elif action == "commit" and not blocks and decode.has_call and not is_committed:
                is_committed = True
                decode.commit()
            elif action == "end" and chance.random() < 0.3:
                (decode.withdraw if decode.has_call and not is_committed else decode.end_call)()
            elif action == "abort" and chance.random() < 0.2:
                decode.handover.abort("request", None)
            elif action == "wait":
                decode.wait(chance.choice((0.1, 1.0, 3.0, 9.0)))
        except TransferRefused:
            decode.end_call()
    while decode.writer.pending:
        decode.writer.finish(0)
    decode.end_call()
    decode.wait(20.0)
    decode.wait(20.0)
    assert decode.is_clean
    ends = [command for command in decode.submitted if isinstance(command, AbortRequest | CommitRequest)]
    assert ends
    if isinstance(ends[0], CommitRequest):
        for index, page in enumerate((5, 1, 6)):
            assert decode.store.page(page, 0, 2) == decode.source.page(index, 0, 2)


def test_it_commits_with_the_last_copy_and_not_before() -> None:
    decode = Decode()
    for block in range(NUM_BLOCKS):
        decode.deliver(block)
    decode.commit()
    for left in (2, 1, 0):
        assert decode.reservation.state is TransferState.RECEIVING
        decode.writer.finish(left)
    assert decode.reservation.state is TransferState.COMMITTED
    assert isinstance(decode.submitted[-1], CommitRequest)


def test_a_copy_outlasts_the_deadline_of_an_abort() -> None:
    decode = Decode()
    decode.deliver(1)
    decode.handover.abort("request", None)
    decode.end_call()
    for _ in range(5):
        decode.wait(DEADLINES.aborting_s)
        assert decode.reservation.state is TransferState.ABORTING
        assert decode.handover.table.next_deadline() == decode.clock + DEADLINES.aborting_s
    decode.writer.finish(0)
    assert decode.reservation.state is TransferState.DRAINED
    assert decode.stats.outcomes["aborted"] == 1
    assert decode.is_clean


def test_a_withdrawal_waits_for_copies_and_stays_one() -> None:
    decode = Decode()
    decode.deliver(0)
    decode.withdraw()
    assert not any(isinstance(command, AbortRequest) for command in decode.submitted)
    decode.writer.finish(0)
    assert decode.stats.outcomes == {"withdrawn": 1}
    assert decode.is_clean


def test_pages_that_can_not_be_written_end_the_transfer() -> None:
    decode = Decode()
    for block in range(NUM_BLOCKS):
        decode.deliver(block)
    decode.commit()
    decode.writer.finish(0)
    decode.writer.finish(0, RuntimeError("no memory"))
    decode.writer.finish(0)
    with pytest.raises(TransferRefused, match=r"could not be written.*no memory"):
        decode.call.result()
    decode.end_call()
    assert not any(isinstance(command, CommitRequest) for command in decode.submitted)
    assert decode.is_clean
