"""Ends of inbound transfers that the simulator (tests/simulation) found to go wrong."""

from baton.core.commands import EngineCommand, FailureReason
from baton.core.request import BlocksReserved, EngineRequest
from baton.core.reservation import Reservation, TransferDeadlines, TransferState
from baton.core.sampling import SamplingParams
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.v1 import transfer_pb2
from baton_decode_service.handover import DecodeHandover
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.wire import Frame
from baton_kv_transfer.transfers.inbound_call import InboundCall
from tests.services.fake_engine import BytesPages, fake_layout

DEADLINES = TransferDeadlines()
LAYOUT = fake_layout()


class Decode:
    """A decode server with one reservation of a single page (baton_decode_service.handover.Effects)."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.wakes_at: float | None = None
        self.failed: list[str] = []
        self.submitted: list[EngineCommand] = []
        self.handover = DecodeHandover(7, BytesPages(LAYOUT, 2), DEADLINES, TransferStats(), self)
        request = EngineRequest("request", (1, 2, 3), b"", (), SamplingParams())
        self.handover.reserve(request)
        self.handover.reserved(BlocksReserved("request", (0, 1), 0))

    def submit(self, command: EngineCommand) -> None:
        self.submitted.append(command)

    def issue(self, reservation: Reservation) -> None:
        self.reservation = reservation

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        self.failed.append(request_id)

    def forget(self, request_id: str) -> None: ...

    def new_transfer_id(self) -> bytes:
        return b"t" * 16

    def now(self) -> float:
        return self.clock

    def deadlines_changed(self) -> None:
        self.wakes_at = self.handover.table.next_deadline()

    def call(self, stream: int, transport: str = "grpc") -> InboundCall:
        """A call that has opened the transfer."""
        call = InboundCall(self.handover.inbound)
        frame = self.frame()
        opening = transfer_pb2.Open(
            layout=codec.layout_to_proto(LAYOUT),
            protocol_version=2,
            transport=transport,
            stream=stream,
            num_streams=2,
        )
        frame.message.open.CopyFrom(opening)
        call.take(frame, self.clock)
        return call

    def commit(self) -> Frame:
        """The frame that a transfer ends with."""
        frame = self.frame()
        frame.message.commit.first_tokens.append(5)
        wire.seal(frame.message.commit)
        return frame

    def frame(self) -> Frame:
        return Frame(transfer_pb2.TransferFrame(transfer_id=b"t" * 16, epoch=7), memoryview(b""))


def test_somebody_wakes_for_the_deadline_of_a_commit_whose_pages_have_not_come() -> None:
    decode = Decode()
    call = decode.call(stream=0, transport="nccl")
    assert decode.wakes_at == DEADLINES.receiving_s
    decode.clock = 1.0
    call.take(decode.commit(), decode.clock)
    assert decode.reservation.state is TransferState.RECEIVING
    assert decode.wakes_at == 1.0 + DEADLINES.committing_s
    decode.clock = decode.wakes_at
    decode.handover.expire()
    assert decode.failed == ["request"]
    assert decode.reservation.state is TransferState.ABORTING


def test_a_transfer_whose_only_call_has_ended_leaves_nothing_behind_when_it_is_aborted() -> None:
    """The first call's connection broke before its first frame came; the second one's pages all came."""
    decode = Decode()
    second = decode.call(stream=1)
    second.no_more_frames()
    assert second.is_decided
    second.end(1.0)
    assert decode.reservation.state is TransferState.RECEIVING
    decode.handover.abort("request", None)
    assert decode.reservation.state is TransferState.DRAINED
    assert len(decode.handover.table) == 0
    assert not decode.handover.inbound._open
    assert not decode.handover.inbound._writers


def test_a_withdrawal_of_a_transfer_of_two_streams_is_no_failure() -> None:
    decode = Decode()
    first, second = decode.call(stream=0), decode.call(stream=1)
    has_heard: list[bool] = []
    second.when_decided(lambda: has_heard.append(True))
    withdraw = decode.frame()
    withdraw.message.withdraw.SetInParent()
    first.take(withdraw, 1.0)
    first.result()
    first.end(1.0)
    assert has_heard == [True]  # before the end of its own frames
    second.result()
    second.end(1.0)
    assert decode.reservation.state is TransferState.DRAINED
    assert decode.handover._stats.outcomes == {"withdrawn": 1}
    assert not decode.handover.inbound._open
