"""Pairs of process groups between real processes, and how they end: each wait has a deadline."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from crc32c import crc32c

from baton.core.errors import TransferRefused
from baton_kv_transfer.transports.pair.process_group import Meeting, sending_end
from baton_kv_transfer.transports.pair.receiving_end import Landed, ReceivingEnd
from baton_kv_transfer.transports.pair.sending_end import MAX_QUEUED_SENDS, SendingEnd
from baton_kv_transfer.transports.pair.wires import GlooWire
from tests.kv_transfer.pair_peer import DEADLINE_S, Options, Peer, content, digest, running_peer

ROOT = Path(__file__).parent.parent.parent
# Long before any stall timeout here that is not meant to be reached.
SOON_S = 5.0
SMALL = Options()
# On the wire long enough to be caught there.
LARGE = Options(max_bytes=48 << 20)

T = TypeVar("T")


async def soon(awaitable: Awaitable[T]) -> T:
    async with asyncio.timeout(SOON_S):
        return await awaitable


class Receiver:
    """A receiving end in this process, and what came of it."""

    def __init__(self) -> None:
        self.landed: asyncio.Queue[tuple[int, Landed | TransferRefused]] = asyncio.Queue()
        self.broken: asyncio.Queue[TransferRefused] = asyncio.Queue()
        self.end: ReceivingEnd[int]

    async def make(self, meeting: Meeting, stall_timeout_s: float) -> "Receiver":
        self.end = await meeting.receiving_end(
            "cpu",
            lambda token, message: self.landed.put_nowait((token, message)),
            self.broken.put_nowait,
            stall_timeout_s=stall_timeout_s,
        )
        return self

    async def next(self) -> tuple[int, str]:
        """Token and digest, or why it was refused."""
        token, message = await soon(self.landed.get())
        if isinstance(message, TransferRefused):
            return token, message.reason
        found = digest(message.payload)
        message.release()
        return token, found


class Sender:
    """A sending end in this process."""

    def __init__(self, announce: Callable[[int, int], None]) -> None:
        self.announce = announce
        self.broken: asyncio.Queue[TransferRefused] = asyncio.Queue()
        self.end: SendingEnd

    async def make(self, port: int, options: Options) -> "Sender":
        self.end = await sending_end(
            "127.0.0.1",
            port,
            "cpu",
            self.broken.put_nowait,
            max_bytes=options.max_bytes,
            stall_timeout_s=options.stall_timeout_s,
        )
        return self

    async def send(self, source: memoryview) -> None:
        await self.end.send(
            len(source),
            lambda memory: np.copyto(np.frombuffer(memory, np.uint8), source),
            lambda crc: self.announce(len(source), crc),
        )


async def make_both_ends(options: Options = SMALL) -> tuple[Sender, Receiver]:
    """A pair within this process; tokens count from 0."""
    meeting = Meeting("127.0.0.1", max_bytes=options.max_bytes)
    tokens = iter(range(1 << 30))
    receiver = Receiver()
    sender = Sender(lambda num_bytes, crc: receiver.end.expect(num_bytes, crc, next(tokens)))
    await soon(
        asyncio.gather(receiver.make(meeting, options.stall_timeout_s), sender.make(meeting.port, options))
    )
    return sender, receiver


@contextlib.asynccontextmanager
async def both_ends(options: Options = SMALL) -> AsyncIterator[tuple[Sender, Receiver]]:
    sender, receiver = await make_both_ends(options)
    try:
        yield sender, receiver
    finally:
        await soon(asyncio.gather(sender.end.close(), receiver.end.close()))


@contextlib.asynccontextmanager
async def sending_to_peer(options: Options = SMALL) -> AsyncIterator[tuple[Sender, Peer]]:
    async with running_peer("receiver", options) as peer:
        sender = Sender(lambda num_bytes, crc: peer.say("expect", num_bytes, crc))
        (port,) = await peer.hear("meeting")
        await soon(sender.make(port, options))
        yield sender, peer
        await soon(sender.end.close())


@contextlib.asynccontextmanager
async def receiving_from_peer(options: Options = SMALL) -> AsyncIterator[tuple[Receiver, Peer]]:
    async with running_peer("sender", options) as peer:
        meeting = Meeting("127.0.0.1", max_bytes=options.max_bytes)
        peer.say("meet", meeting.port)
        receiver = await soon(Receiver().make(meeting, options.stall_timeout_s))
        yield receiver, peer
        await soon(receiver.end.close())


def sizes(count: int, max_bytes: int) -> list[int]:
    drawn = np.random.default_rng(7).integers(1, max_bytes, count - 2, endpoint=True).tolist()
    return [1, max_bytes, *drawn]


async def pair_works(sender: Sender, receiver: Receiver) -> None:
    source = content(1000, 1)
    _, (_, found) = await soon(asyncio.gather(sender.send(source), receiver.next()))
    assert found == digest(source)


# What it is for.


async def test_messages_of_all_sizes_arrive_in_order_in_another_process() -> None:
    async with sending_to_peer() as (sender, peer):
        messages = [content(size, seed) for seed, size in enumerate(sizes(150, SMALL.max_bytes))]
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as sends:
            for message in messages:
                sends.create_task(sender.send(message))
            for index, message in enumerate(messages):
                assert await peer.hear("landed") == [index, digest(message)]


async def test_messages_of_all_sizes_arrive_in_order_from_another_process() -> None:
    async with receiving_from_peer() as (receiver, peer):
        drawn = sizes(80, SMALL.max_bytes)
        for seed, size in enumerate(drawn):
            peer.say("send", size, seed)
        for seed, size in enumerate(drawn):
            num_bytes, crc = await peer.hear("announce")
            assert (num_bytes, crc) == (size, crc32c(content(size, seed)))
            receiver.end.expect(num_bytes, crc, seed)
            assert await receiver.next() == (seed, digest(content(size, seed)))


async def test_two_pairs_in_one_process_do_not_mix() -> None:
    async with both_ends() as (a, a_receiver), both_ends() as (b, b_receiver):
        sources = [content(300_000, seed) for seed in range(20)]
        async with asyncio.TaskGroup() as sends:
            for index, source in enumerate(sources):
                sends.create_task((a if index % 2 else b).send(source))
            for index in range(0, 20, 2):
                assert await b_receiver.next() == (index // 2, digest(sources[index]))
                assert await a_receiver.next() == (index // 2, digest(sources[index + 1]))


async def test_a_wrong_checksum_spoils_one_message_only() -> None:
    async with both_ends() as (sender, receiver):
        honest = sender.announce
        sender.announce = lambda num_bytes, crc: honest(num_bytes, crc ^ 1)
        await soon(sender.send(content(1000, 1)))
        assert await receiver.next() == (0, "checksum")
        sender.announce = honest
        await pair_works(sender, receiver)


async def test_the_shorter_buffers_bound_messages() -> None:
    meeting, receiver, sender = Meeting("127.0.0.1", max_bytes=4096), Receiver(), Sender(lambda *_: None)
    await soon(asyncio.gather(receiver.make(meeting, 60.0), sender.make(meeting.port, SMALL)))
    assert sender.end.max_bytes == receiver.end.max_bytes == 4096
    with pytest.raises(ValueError, match="4097"):
        await sender.send(content(4097, 1))
    await soon(asyncio.gather(sender.end.close(), receiver.end.close()))


async def test_a_message_waits_until_a_landing_buffer_is_given_back() -> None:
    async with both_ends() as (sender, receiver):
        sources = [content(100_000, seed) for seed in range(4)]
        for source in sources[:3]:
            await soon(sender.send(source))
        held = [await soon(receiver.landed.get()) for _ in range(3)]
        await soon(sender.send(sources[3]))
        for (token, message), source in zip(held, sources, strict=False):
            assert isinstance(message, Landed)
            assert digest(message.payload) == digest(source), token
        assert receiver.landed.empty()
        message.release()
        message.release()  # means nothing
        assert await receiver.next() == (3, digest(sources[3]))


# What the caller does.


async def test_what_fill_raises_comes_back_and_nothing_is_sent() -> None:
    async with both_ends() as (sender, receiver):
        with pytest.raises(IndexError, match="no such page"):
            await soon(sender.end.send(10, _raise(IndexError("no such page")), lambda crc: None))
        await pair_works(sender, receiver)


async def test_an_announcement_that_fails_breaks_the_pair() -> None:
    async with both_ends() as (sender, _):
        with pytest.raises(TransferRefused, match="stream is gone"):
            await soon(
                sender.end.send(10, lambda memory: None, _raise(ConnectionError("the stream is gone")))
            )
        assert "stream is gone" in str(await soon(sender.broken.get()))


def _raise(error: Exception) -> Callable[[object], None]:
    def function(_: object) -> None:
        raise error

    return function


async def test_a_cancelled_send_returns_once_its_source_is_read_no_more() -> None:
    async with both_ends() as (sender, receiver):
        began, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def fill(memory: memoryview) -> None:
            loop.call_soon_threadsafe(began.set)
            assert go_on.wait(SOON_S)

        announced: list[int] = []
        being_read = asyncio.create_task(
            sender.end.send(10, fill, lambda crc: receiver.end.expect(10, crc, 0))
        )
        await soon(began.wait())
        not_begun = asyncio.create_task(sender.end.send(10, fill, announced.append))
        await asyncio.sleep(0)
        not_begun.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(not_begun)
        being_read.cancel()
        done, _ = await asyncio.wait([being_read], timeout=0.05)
        assert not done
        being_read.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await soon(being_read)
        assert (await receiver.next())[0] == 0
        sender.announce = lambda num_bytes, crc: receiver.end.expect(num_bytes, crc, 1)
        await pair_works(sender, receiver)
        assert announced == []


async def test_close_fails_what_is_under_way_and_may_be_repeated() -> None:
    async with both_ends() as (sender, _):
        sender.announce = lambda num_bytes, crc: None  # so that they are never taken
        sends = [asyncio.create_task(sender.send(content(1000, 1))) for _ in range(MAX_QUEUED_SENDS + 5)]
        await soon(asyncio.gather(*sends[:3]))
        await soon(asyncio.gather(sender.end.close(), sender.end.close()))
        for send in sends[3:]:
            with pytest.raises(TransferRefused):
                await soon(send)
        with pytest.raises(TransferRefused, match="closed"):
            await soon(sender.send(content(1000, 1)))
        assert sender.broken.empty()


async def test_close_answers_for_what_was_expected_and_may_be_repeated() -> None:
    async with both_ends() as (_, receiver):
        for token in range(5):  # more than there are buffers
            receiver.end.expect(1000, 0, token)
        await soon(asyncio.gather(receiver.end.close(), receiver.end.close()))
        assert [await receiver.next() for _ in range(5)] == [(token, "pair") for token in range(5)]
        with pytest.raises(TransferRefused, match="closed"):
            receiver.end.expect(1000, 0, 9)
        assert receiver.broken.empty()


async def test_an_impossible_announcement_breaks_the_pair() -> None:
    async with both_ends() as (sender, receiver):
        with pytest.raises(TransferRefused, match="announced"):
            receiver.end.expect(SMALL.max_bytes + 1, 0, 0)
        await soon(receiver.broken.get())
        await _send_until_refused(sender, content(1000, 1))
        await soon(sender.broken.get())


async def _send_until_refused(sender: Sender, source: memoryview) -> None:
    """More cannot be sent than there are buffers."""
    outcomes = await soon(asyncio.gather(*(sender.send(source) for _ in range(10)), return_exceptions=True))
    assert isinstance(outcomes[-1], TransferRefused)


# Peers that go away.


async def test_a_receiver_killed_in_the_middle_of_a_message_is_noticed_at_once() -> None:
    async with sending_to_peer(LARGE) as (sender, peer):
        source = content(LARGE.max_bytes, 1)
        sends = [asyncio.create_task(sender.send(source)) for _ in range(6)]
        await peer.hear("landed")
        await peer.kill()
        assert (await soon(sender.broken.get())).reason == "pair"
        assert not sender.end.is_whole  # nobody is to begin another transfer on it while it closes
        outcomes = await soon(asyncio.gather(*sends, return_exceptions=True))
        assert {type(outcome) for outcome in outcomes} == {type(None), TransferRefused}
        with pytest.raises(TransferRefused):
            await soon(sender.send(source))
    async with sending_to_peer() as (sender, peer):
        await soon(sender.send(content(10, 1)))
        await peer.hear("landed")


async def test_a_sender_killed_in_the_middle_of_a_message_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    landing: asyncio.Queue[memoryview] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    receive = GlooWire.receive

    def seen(self: GlooWire, buffer: object, num_bytes: int) -> object:
        buffer.memory[0] = 0  # type: ignore[attr-defined]
        loop.call_soon_threadsafe(landing.put_nowait, buffer.memory)  # type: ignore[attr-defined]
        return receive(self, buffer, num_bytes)  # type: ignore[arg-type]

    async with receiving_from_peer(LARGE) as (receiver, peer):
        monkeypatch.setattr(GlooWire, "receive", seen)
        for seed in range(3):
            peer.say("send", LARGE.max_bytes, seed)
        num_bytes, crc = await peer.hear("announce")
        receiver.end.expect(num_bytes, crc, 0)
        memory = await soon(landing.get())
        await _until(lambda: memory[0] != 0)
        await peer.kill()
        receiver_saw = await receiver.next()
        assert receiver_saw[0] == 0
        if receiver_saw[1] == "pair":  # it was caught on the wire
            assert (await soon(receiver.broken.get())).reason == "pair"
        with contextlib.suppress(TransferRefused):
            receiver.end.expect(1000, 0, 1)
            await soon(receiver.broken.get())
    async with receiving_from_peer() as (receiver, peer):
        peer.say("send", 1000, 1)
        num_bytes, crc = await peer.hear("announce")
        receiver.end.expect(num_bytes, crc, 0)
        assert await receiver.next() == (0, digest(content(1000, 1)))


async def test_a_stopped_receiver_is_given_up_after_the_stall_timeout() -> None:
    async with sending_to_peer(Options(stall_timeout_s=0.3)) as (sender, peer):
        peer.signal(signal.SIGSTOP)
        await _send_until_refused(sender, content(SMALL.max_bytes, 1))
        assert (await soon(sender.broken.get())).reason == "pair"
        assert not sender.end.is_whole  # nobody is to begin another transfer on it while it closes
        peer.signal(signal.SIGCONT)


async def test_a_receiver_that_stops_taking_is_found_by_an_idle_sender() -> None:
    async with sending_to_peer(Options(stall_timeout_s=0.3)) as (sender, peer):
        peer.signal(signal.SIGSTOP)
        await soon(sender.send(content(10, 1)))
        assert (await soon(sender.broken.get())).reason == "pair"
        assert not sender.end.is_whole  # nobody is to begin another transfer on it while it closes


async def test_a_stopped_sender_is_given_up_after_the_stall_timeout() -> None:
    async with receiving_from_peer(Options(stall_timeout_s=0.3)) as (receiver, peer):
        peer.signal(signal.SIGSTOP)
        receiver.end.expect(1000, 0, 0)
        assert await receiver.next() == (0, "pair")
        assert (await soon(receiver.broken.get())).reason == "pair"
        peer.signal(signal.SIGCONT)


async def test_close_does_not_wait_for_a_stopped_peer() -> None:
    async with sending_to_peer(LARGE) as (sender, peer), receiving_from_peer() as (receiver, other):
        peer.signal(signal.SIGSTOP)
        other.signal(signal.SIGSTOP)
        receiver.end.expect(1000, 0, 0)
        source = content(LARGE.max_bytes, 1)
        sends = [asyncio.create_task(sender.send(source)) for _ in range(5)]
        await soon(asyncio.gather(*sends[:3]))
        start = time.monotonic()
        await asyncio.gather(sender.end.close(), receiver.end.close())
        assert time.monotonic() - start < 2.0
        for outcome in await soon(asyncio.gather(*sends[3:], return_exceptions=True)):
            assert isinstance(outcome, TransferRefused)


async def test_the_peer_notices_a_close() -> None:
    async with both_ends() as (sender, receiver):
        receiver.end.expect(1000, 0, 0)
        await soon(sender.end.close())
        assert await receiver.next() == (0, "pair")
        assert (await soon(receiver.broken.get())).reason == "pair"


# Meetings.


async def test_a_receiver_waits_for_its_sender_so_long() -> None:
    with pytest.raises(TransferRefused, match="did not come"):
        await soon(
            Meeting("127.0.0.1").receiving_end("cpu", lambda *_: None, lambda _: None, meeting_timeout_s=0.1)
        )


async def test_a_receiver_meets_a_sender_that_says_nothing() -> None:
    meeting = Meeting("127.0.0.1")
    with (
        socket.create_connection(("127.0.0.1", meeting.port)),
        pytest.raises(TransferRefused, match="timed out"),
    ):
        await soon(meeting.receiving_end("cpu", lambda *_: None, lambda _: None, meeting_timeout_s=0.1))


async def test_a_sender_finds_nobody() -> None:
    meeting = Meeting("127.0.0.1")
    meeting.close()
    with pytest.raises(TransferRefused, match="refused"):
        await soon(sending_end("127.0.0.1", meeting.port, "cpu", lambda _: None))


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


async def test_a_sender_finds_a_receiver_that_does_not_answer() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(TransferRefused, match="timed out"),
    ):
        await soon(
            sending_end("127.0.0.1", port_of(server), "cpu", lambda _: None, meeting_timeout_s=0.1),
        )


async def test_a_receiver_that_dies_at_the_meeting_is_noticed_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = asyncio.create_task(sending_end("127.0.0.1", port_of(server), "cpu", lambda _: None))
        connection, _ = await asyncio.to_thread(server.accept)
        connection.close()
        with pytest.raises(TransferRefused):
            await soon(meeting)


async def test_meetings_that_are_cancelled_leave_nothing_behind() -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        sending = asyncio.create_task(sending_end("127.0.0.1", port_of(server), "cpu", lambda _: None))
        connection, _ = await asyncio.get_running_loop().sock_accept(server)
        with connection:
            meeting = Meeting("127.0.0.1")
            receiving = asyncio.create_task(meeting.receiving_end("cpu", lambda *_: None, lambda _: None))
            await asyncio.sleep(0)
            for task in (sending, receiving):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await soon(task)
            await _until(lambda: threading.active_count() <= before)


async def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(TransferRefused, match=r"198\.51\.100\.1"):
        Meeting("198.51.100.1")


# What is left of it all.


async def test_pairs_give_back_threads_and_descriptors_and_touch_nothing_global() -> None:
    async with both_ends() as (sender, receiver):
        await pair_works(sender, receiver)
    state = torch.get_num_threads(), torch.get_num_interop_threads(), dict(os.environ)
    threads, descriptors = threading.active_count(), _count_descriptors()
    for _ in range(3):
        async with both_ends() as (sender, receiver):
            await pair_works(sender, receiver)
    await _until(lambda: threading.active_count() <= threads and _count_descriptors() <= descriptors)
    assert (torch.get_num_threads(), torch.get_num_interop_threads(), dict(os.environ)) == state
    assert not torch.distributed.is_initialized()


async def _until(condition: Callable[[], bool]) -> None:
    """For what nobody tells of."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def _count_descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables")
async def test_only_the_given_interface_is_listened_on() -> None:
    meeting = Meeting("127.0.0.1")
    assert _listening() == {"0100007F"}
    meeting.close()
    async with both_ends():
        assert _listening() == {"0100007F"}


def _listening() -> set[str]:
    """Addresses that this process listens on, in hex."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


EXIT = """
import asyncio, socket
from tests.kv_transfer.test_process_group import SMALL, Options, content, make_both_ends, sending_end

async def main():
    kept = [await make_both_ends() for _ in range(4)]
    (_, awaits), (sends, _), (closed, broken), _idle = kept
    awaits.end.expect(1000, 0, 0)
    sends.announce = lambda *_: None
    for _ in range(3):
        await sends.send(content(SMALL.max_bytes, 1))
    broken.end.expect(1000, 0, 0)
    await closed.end.close()
    await broken.broken.get()
    for tenth in range(1, 8):  # waits that would be over while the interpreter shuts down
        kept.append(await make_both_ends(Options(stall_timeout_s=tenth / 10)))
        kept[-1][1].end.expect(1000, 0, 0)
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    meeting = asyncio.create_task(sending_end(*server.getsockname(), "cpu", print))
    await asyncio.get_running_loop().sock_accept(server)
    return kept

kept = asyncio.run(main())
"""


def test_the_interpreter_exits_cleanly_whatever_pairs_it_has() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", EXIT], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S * 2
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
