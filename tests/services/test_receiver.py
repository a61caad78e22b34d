"""Push calls made by hand against a decode server: whatever is wrong is refused before it touches a page."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from crc32c import crc32c

from baton.core.reservation import TransferDeadlines
from baton.v1 import worker_pb2
from tests.services.by_hand import next_event, reserve
from tests.services.cluster import until
from tests.services.push_bench import NUM_BLOCKS, Bench, Frame, bench


async def test_a_right_transfer_is_committed_byte_for_byte() -> None:
    async with bench() as made:
        reservation = made.table.of_request("by hand 1")
        table = reservation.block_table
        frames = (made.pages(2, 1, 1, 1), made.pages(0, 2), made.pages(2, 1, 0, 1))
        result = await made.push(made.open(), *frames, made.commit(5))
        assert result.bytes_received == NUM_BLOCKS * made.layout.bytes_per_block
        assert made.worker.service._stats.outcomes == {"committed": 1}
        store = made.worker.engine.page_store
        for index in (0, 1):  # the last page goes on being written
            assert store.page(table[index], 0, 2) == made.source.page(index, 0, 2)
        output = (await next_event(made.session, "step_output")).step_output
        while not output.token_ids:
            output = (await next_event(made.session, "step_output")).step_output
        assert output.positions[0] == 1


def with_epoch(frame: Frame) -> Frame:
    frame.epoch += 1
    return frame


def with_ticket(frame: Frame) -> Frame:
    frame.transfer_id = b"\1" * 16
    return frame


def corrupted(frame: Frame) -> Frame:
    payload = bytearray(frame.pages.payload)
    payload[len(payload) // 2] ^= 1
    frame.pages.payload = bytes(payload)
    return frame


def moved(frame: Frame, first_block: int) -> Frame:
    frame.pages.first_block = first_block
    return frame


def cut(frame: Frame) -> Frame:
    frame.pages.payload = frame.pages.payload[:-1]
    return frame


def with_other_token(frame: Frame) -> Frame:
    frame.commit.first_tokens[0] ^= 1
    return frame


def with_another_choice_finished(frame: Frame) -> Frame:
    frame.commit.finished_choices.append(frame.commit.first_tokens.pop())
    return frame


def without_seal(frame: Frame) -> Frame:
    frame.commit.ClearField("crc32c")
    return frame


def pages_as_withdrawal(made: Bench) -> Frame:
    frame = made.frame()
    frame.withdraw.MergeFromString(made.pages(0, 3).pages.SerializeToString())
    return frame


# What is sent after a right Open, and the reason that it is refused for.
WRONG_FRAMES: dict[str, tuple[str, Callable[[Bench], Frame]]] = {
    "stale epoch": ("epoch", lambda made: with_epoch(made.pages(0, 1))),
    "unknown ticket": ("ticket", lambda made: with_ticket(made.pages(0, 1))),
    "one byte changed": ("checksum", lambda made: corrupted(made.pages(0, 3))),
    "too short": ("length", lambda made: cut(made.pages(0, 3))),
    "no block": ("range", lambda made: made.pages(1, 0)),
    "blocks outside": ("range", lambda made: made.pages(2, 2)),
    "far outside": ("range", lambda made: moved(made.pages(0, 1), 2**32 - 1)),
    "layers outside": ("range", lambda made: made.pages(0, 1, 1, 2)),
    "second open": ("state", lambda made: made.open()),
    "early commit": ("incomplete", lambda made: made.commit(5)),
    "commit of nothing": ("incomplete", lambda made: made.commit(5, finished=(0,))),
    "commit of another token": ("checksum", lambda made: with_other_token(made.commit(5))),
    "commit of other choices": ("checksum", lambda made: with_another_choice_finished(made.commit(5, 1))),
    "commit without its checksum": ("checksum", lambda made: without_seal(made.commit(5))),
    "pages that a bit turned into a withdrawal": ("frame", pages_as_withdrawal),
    "unknown kind": ("frame", lambda made: made.frame()),
}


@pytest.mark.parametrize("case", WRONG_FRAMES)
async def test_a_wrong_frame_ends_the_transfer_and_touches_no_page(case: str) -> None:
    reason, make = WRONG_FRAMES[case]
    async with bench() as made:
        await made.refused(reason, made.open(), make(made))
        assert made.untouched()
        await made.let_go()
        await made.refused("ticket", made.open())  # it is worth nothing any more


@pytest.mark.parametrize("version", [0, 1, 3])
async def test_another_protocol_version_is_refused_in_words(version: int) -> None:
    async with bench() as made:
        frame = made.open()
        frame.open.protocol_version = version
        await made.refused("version", frame, made.pages(0, 3), made.commit(5))
        assert made.untouched()


async def test_a_stream_that_ends_without_commit_is_no_transfer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with bench() as made:
        await made.refused("incomplete", made.open(), made.pages(0, 3))
        await made.let_go()
        assert "transfer of by hand 1 refused (incomplete)" in caplog.text


async def test_a_commit_with_one_layer_of_one_block_missing_is_refused() -> None:
    async with bench() as made:
        await made.refused(
            "incomplete", made.open(), made.pages(0, 2), made.pages(2, 1, 0, 1), made.commit(5)
        )
        await made.let_go()


async def test_a_frame_that_comes_twice_is_refused() -> None:
    async with bench() as made:
        again = made.pages(1, 2)
        again.pages.payload = bytes(len(again.pages.payload))
        again.pages.crc32c = crc32c(again.pages.payload)
        table = made.table.of_request("by hand 1").block_table
        await made.refused("duplicate", made.open(), made.pages(0, 2), again)
        assert made.worker.engine.page_store.page(table[1], 0, 2) == made.source.page(1, 0, 2)
        await made.let_go()


@pytest.mark.parametrize("case", ["pages", "commit", "withdraw"])
async def test_nothing_is_taken_before_open(case: str) -> None:
    async with bench() as made:
        withdraw = made.frame()
        withdraw.withdraw.SetInParent()
        frames = {"pages": made.pages(0, 3), "commit": made.commit(5), "withdraw": withdraw}
        await made.refused("ticket", frames[case])
        assert made.untouched()
        assert len(made.table) == 1  # its rightful owner may still open it


async def test_an_open_of_another_epoch_or_layout_takes_nothing() -> None:
    async with bench() as made:
        await made.refused("epoch", with_epoch(made.open()))
        await made.refused("ticket", with_ticket(made.open()))
        await made.refused("layout", made.open(layout=replace(made.layout, head_dim=4)))
        assert len(made.table) == 1
        await made.push(made.open(), made.pages(0, 3), made.commit(5))


async def test_a_ticket_opens_once() -> None:
    async with bench() as made:
        first = made.stub.Push()
        await first.write(made.open())
        await until(lambda: made.table.of_request("by hand 1").state.value == "receiving")
        await made.refused("state", made.open(), made.pages(0, 3), made.commit(5))
        assert made.untouched()
        for frame in (made.pages(0, 3), made.commit(5)):  # the first one goes on undisturbed
            await first.write(frame)
        await first.done_writing()
        assert (await first).bytes_received == NUM_BLOCKS * made.layout.bytes_per_block


async def test_a_call_writes_no_pages_but_its_own() -> None:
    async with bench() as made:
        first = made.ticket
        second = await made.reserve(2)
        other = made.stub.Push()
        await other.write(made.open(second))
        await until(lambda: made.table.of_request("by hand 2").state.value == "receiving")
        await made.refused("ticket", made.open(first), made.pages(0, 3, ticket=second))
        assert made.untouched()
        await until(lambda: list(made.worker.service.sessions._requests) == ["by hand 2"])
        other.cancel()


async def test_an_abort_ends_the_call_and_its_frames_are_refused() -> None:
    async with bench() as made:
        call = made.stub.Push()
        await call.write(made.open())
        await until(lambda: made.table.of_request("by hand 1").state.value == "receiving")
        await made.session.write(worker_pb2.Command(abort=worker_pb2.Abort(number=1)))
        with pytest.raises(grpc.aio.AioRpcError, match="aborting") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await made.refused("ticket", made.open(), made.pages(0, 3))
        assert made.untouched()
        assert made.worker.service._stats.outcomes == {"state": 1, "aborted": 1, "ticket": 1}
        await until(lambda: not made.worker.leftovers)


async def test_an_abort_before_open_makes_the_ticket_worthless() -> None:
    async with bench() as made:
        await made.session.write(worker_pb2.Command(abort=worker_pb2.Abort(number=1)))
        await until(lambda: not made.worker.leftovers)
        await made.refused("ticket", made.open(), made.pages(0, 3), made.commit(5))
        assert made.untouched()


async def test_a_prefill_server_that_hangs_up_lets_the_pages_go() -> None:
    async with bench() as made:
        call = made.stub.Push()
        await call.write(made.open())
        await call.write(made.pages(0, 1))
        await until(lambda: made.worker.service._stats.num_bytes)
        call.cancel()
        await made.let_go()
        # The end of the frames may come before the word that the call was cancelled.
        outcomes = made.worker.service._stats.outcomes
        assert outcomes in ({"aborted": 1}, {"aborted": 1, "incomplete": 1})


async def test_a_ticket_that_nobody_uses_expires() -> None:
    async with bench(TransferDeadlines(reserved_s=0.05)) as made:
        await made.failed()
        assert made.worker.service._stats.outcomes == {"deadline": 1, "aborted": 1}
        await made.refused("ticket", made.open())


async def test_a_writer_that_falls_silent_is_fenced_off() -> None:
    async with bench(TransferDeadlines(receiving_s=0.05, aborting_s=0.05)) as made:
        call = made.stub.Push()
        await call.write(made.open())
        await made.failed()
        with pytest.raises(grpc.aio.AioRpcError, match="aborting"):
            await call
        await made.refused("ticket", made.open(), made.pages(0, 3))
        assert made.untouched()


async def test_every_frame_gives_the_writer_new_time() -> None:
    async with bench(TransferDeadlines(receiving_s=0.2)) as made:
        call = made.stub.Push()
        await call.write(made.open())
        reservation = made.table.of_request("by hand 1")
        await until(lambda: reservation.state.value == "receiving")
        opened = reservation.deadline
        await call.write(made.pages(0, 1))
        await until(lambda: reservation.deadline > opened)
        call.cancel()
        await made.let_go()


async def test_a_withdrawal_is_no_failure() -> None:
    async with bench() as made:
        withdraw = made.frame()
        withdraw.withdraw.SetInParent()
        await made.push(made.open(), made.pages(0, 1), withdraw)
        await until(lambda: not made.worker.leftovers)
        assert made.worker.service._stats.outcomes == {"withdrawn": 1}
        await made.session.write(reserve(2, "by hand 2"))
        kinds = set()
        while "reserved" not in kinds:
            event: Any = await made.session.read()
            kinds.add(event.WhichOneof("event"))
        assert "failed" not in kinds
