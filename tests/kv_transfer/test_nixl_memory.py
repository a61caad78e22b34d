"""Reads with NIXL between real processes: byte for byte, or refused in time, whatever the other one does."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from crc32c import crc32c

from baton.core.errors import StartupError, TransferRefused
from baton_kv_transfer.transports.nixl import library as nixl_library
from baton_kv_transfer.transports.nixl import read_thread as nixl_reads
from baton_kv_transfer.transports.nixl.reader import NixlReader, NixlSource, RemoteMemory
from tests.kv_transfer.nixl_processes import (
    BYTES_PER_BLOCK,
    NUM_BLOCKS,
    Source,
    encoded,
    line_of,
    pool_of,
    running,
    running_source,
)
from tests.services.cluster import until

pytestmark = pytest.mark.skipif(
    not nixl_library.is_available(), reason=nixl_library.why_unavailable() or "NIXL is here"
)

PATIENCE_S = 30.0  # where nothing is to go wrong
Ranges = list[tuple[int, int]]


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    """A source that no test harms."""
    with running_source(seed=1) as made:
        yield made


@asynccontextmanager
async def made_reader(num_slots: int = 4, slot_bytes: int = 1 << 20) -> AsyncIterator[NixlReader]:
    reader = NixlReader(num_slots=num_slots, slot_bytes=slot_bytes)
    try:
        yield reader
    finally:
        await reader.close()


def scattered(seed: int, num_blocks: int = 20) -> Ranges:
    blocks = random.Random(seed).sample(range(NUM_BLOCKS), num_blocks)
    return [(block * BYTES_PER_BLOCK, BYTES_PER_BLOCK) for block in blocks]


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The sources that readers connected with, each as often as that was."""
    sources: list[bytes] = []
    connect = nixl_reads._Connection.__init__

    def noted(connection: nixl_reads._Connection, source: bytes, buffer: nixl_reads.LandingBuffer) -> None:
        sources.append(source)
        connect(connection, source, buffer)

    monkeypatch.setattr(nixl_reads._Connection, "__init__", noted)
    return sources


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[nixl_reads.Read]:
    """Reads that came to their end."""
    reads: list[nixl_reads.Read] = []
    finish = nixl_reads.ReadThread._finish

    def noted(thread: nixl_reads.ReadThread, read: nixl_reads.Read) -> None:
        reads.append(read)
        finish(thread, read)

    monkeypatch.setattr(nixl_reads.ReadThread, "_finish", noted)
    return reads


def bytes_of(pool: memoryview, ranges: Ranges) -> bytes:
    return b"".join(pool[offset : offset + length] for offset, length in ranges)


async def read_and_check(
    reader: NixlReader, source: Source, ranges: Ranges, timeout_s: float = PATIENCE_S
) -> None:
    expected = bytes_of(source.pool, ranges)
    landing = await reader.read(source.remote, ranges, crc=crc32c(expected), timeout_s=timeout_s)
    assert landing.memory == expected
    landing.release()


async def refusal(reader: NixlReader, remote: RemoteMemory, ranges: Ranges, timeout_s: float = 10) -> str:
    with pytest.raises(TransferRefused) as refused:
        await reader.read(remote, ranges, crc=None, timeout_s=timeout_s)
    return refused.value.reason


async def test_scattered_blocks_arrive_byte_for_byte(source: Source, connected: list[bytes]) -> None:
    async with made_reader() as reader:
        for seed in range(10):
            await read_and_check(reader, source, scattered(seed))
    assert len(connected) == 1


async def test_what_lies_together_is_one_descriptor(source: Source, finished: list[nixl_reads.Read]) -> None:
    async with made_reader() as reader:
        await read_and_check(reader, source, [(0, 100), (100, 50), (150, 7), (200, 1), (100, 100)])
    assert [length for _, length in finished[0].pieces] == [157, 1, 100]


async def test_any_part_of_the_pool_can_be_read(source: Source) -> None:
    async with made_reader() as reader:
        size = len(source.pool)
        await read_and_check(reader, source, [(size - 1, 1), (0, 1), (size - reader.slot_bytes + 2, 3)])
        await read_and_check(reader, source, [(size - reader.slot_bytes, reader.slot_bytes)])


async def test_a_wrong_checksum_is_refused(source: Source, connected: list[bytes]) -> None:
    async with made_reader(num_slots=1) as reader:
        for _ in range(3):
            with pytest.raises(TransferRefused) as refused:
                await reader.read(source.remote, scattered(1), crc=7, timeout_s=PATIENCE_S)
            assert refused.value.reason == "checksum"
        await read_and_check(reader, source, scattered(2))
    assert len(connected) == 1


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, 0)],
        [(-1, 10)],
        [(10, -5)],
        [(NUM_BLOCKS * BYTES_PER_BLOCK, 1)],
        [(0, 10), (NUM_BLOCKS * BYTES_PER_BLOCK - 9, 10)],
        [(0, (1 << 20) + 1)],
        [(0, 1 << 19), (0, 1 << 19), (0, 1)],
    ],
)
async def test_what_is_no_part_of_the_pool_is_refused(source: Source, ranges: Ranges) -> None:
    async with made_reader() as reader:
        assert await refusal(reader, source.remote, ranges) == "range"


async def test_a_pool_that_is_not_as_said_is_refused(source: Source) -> None:
    """NIXL knows what the source has registered."""
    async with made_reader() as reader:
        size = NUM_BLOCKS * BYTES_PER_BLOCK
        larger = replace(source.remote, num_blocks=NUM_BLOCKS + 1)
        assert await refusal(reader, larger, [(size, 10)]) == "nixl"
        nonsense = replace(source.remote, agent_metadata=b"nonsense")
        assert await refusal(reader, nonsense, [(0, 10)]) == "nixl"
        far = replace(source.remote, base_address=2**64 - 1)
        assert await refusal(reader, far, [(0, 10)]) == "nixl"
        await read_and_check(reader, source, scattered(3))


async def test_many_reads_at_once_share_the_slots(source: Source) -> None:
    async with made_reader(num_slots=2) as reader, asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        for seed in range(100):
            tasks.create_task(read_and_check(reader, source, scattered(seed)))


async def test_a_read_waits_for_a_slot(source: Source) -> None:
    async with made_reader(num_slots=2) as reader:
        held = [await reader.read(source.remote, scattered(1), crc=None, timeout_s=5) for _ in range(2)]
        assert await refusal(reader, source.remote, scattered(2), timeout_s=0.05) == "deadline"
        waiting = asyncio.create_task(read_and_check(reader, source, scattered(2)))
        await asyncio.sleep(0)
        for landing in held:
            landing.release()
            landing.release()
        await waiting
        assert reader._free_slots.qsize() == 2


async def test_a_cancelled_read_gives_its_slot_back(source: Source) -> None:
    async with made_reader(num_slots=1) as reader:
        for number in range(20):
            task = asyncio.create_task(read_and_check(reader, source, scattered(number)))
            await asyncio.sleep(number * 0.0002)  # at whatever it is then
            task.cancel()
            await asyncio.wait([task], timeout=PATIENCE_S)
        await read_and_check(reader, source, scattered(0))


async def test_source_and_reader_in_one_process() -> None:
    pool = pool_of(5)
    offered = NixlSource(pool, BYTES_PER_BLOCK, NUM_BLOCKS)
    async with made_reader() as reader:
        await reader.connect(offered.remote, PATIENCE_S)
        for seed in range(5):
            landing = await reader.read(offered.remote, scattered(seed), crc=None, timeout_s=PATIENCE_S)
            assert landing.memory == bytes_of(pool, scattered(seed))
            landing.release()
    offered.close()


async def read_until_refused(reader: NixlReader, source: Source, seed: int) -> TransferRefused:
    while True:
        try:
            await read_and_check(reader, source, scattered(seed), timeout_s=5)
        except TransferRefused as refused:
            return refused
        seed += 1


@pytest.mark.parametrize("num_reads", [1, 7, 40])
async def test_a_source_that_dies_fails_its_reads_alone(
    source: Source, num_reads: int, finished: list[nixl_reads.Read], capfd: pytest.CaptureFixture[str]
) -> None:
    async with made_reader() as reader, asyncio.timeout(PATIENCE_S):
        with running_source(seed=2) as mortal:
            tasks = [asyncio.create_task(read_until_refused(reader, mortal, seed)) for seed in range(4)]
            await until(lambda: len(finished) >= num_reads)
            mortal.kill()
            assert {refused.reason for refused in await asyncio.gather(*tasks)} == {"nixl"}
            assert await refusal(reader, mortal.remote, scattered(1)) == "nixl"
        with running_source(seed=3) as successor:
            for seed in range(4):
                await read_and_check(reader, successor, scattered(seed))
        await read_and_check(reader, source, scattered(9))
    assert reader._free_slots.qsize() == 4
    assert capfd.readouterr().out == ""


async def test_a_source_that_hangs_before_it_answers_fails_in_time(source: Source) -> None:
    async with made_reader(num_slots=2) as reader, asyncio.timeout(PATIENCE_S):
        with running_source(seed=2) as hanging:
            hanging.stop()
            began = asyncio.get_running_loop().time()
            failing = [
                asyncio.create_task(refusal(reader, hanging.remote, scattered(seed), timeout_s=1))
                for seed in range(6)
            ]
            for seed in range(10):  # in the slot that the source which hangs does not get
                await read_and_check(reader, source, scattered(seed))
            assert not any(task.done() for task in failing)
            assert set(await asyncio.gather(*failing)) == {"deadline"}
            assert asyncio.get_running_loop().time() - began < 3
            hanging.go_on()
            for seed in range(10):
                await read_and_check(reader, hanging, scattered(seed))
                await read_and_check(reader, source, scattered(seed))


async def test_nothing_is_written_after_a_read_was_given_up() -> None:
    async with made_reader(num_slots=1) as reader, asyncio.timeout(PATIENCE_S):
        with running_source(seed=2) as hanging, running_source(seed=3) as other:
            hanging.stop()
            assert await refusal(reader, hanging.remote, scattered(1), timeout_s=0.3) == "deadline"
            reader._landing_buffer[:] = bytes(len(reader._landing_buffer))
            hanging.go_on()
            await reader.connect(other.remote, PATIENCE_S)
            await reader.connect(other.remote, PATIENCE_S)
            assert reader._landing_buffer[1:] == bytes(len(reader._landing_buffer) - 1)
            await read_and_check(reader, hanging, scattered(1))


async def test_a_source_that_is_connected_may_hang() -> None:
    """Reads take nothing of it but its memory."""
    async with made_reader() as reader, asyncio.timeout(PATIENCE_S):
        with running_source(seed=2) as hanging:
            await reader.connect(hanging.remote, PATIENCE_S)
            hanging.stop()
            await read_and_check(reader, hanging, scattered(1))
            hanging.go_on()


async def test_a_reader_that_dies_harms_no_source() -> None:
    async with made_reader() as reader, asyncio.timeout(2 * PATIENCE_S):
        with running_source(seed=2) as offered:
            for _ in range(3):
                with running("reader", encoded(offered.remote)) as other:
                    assert await asyncio.to_thread(line_of, other) == "reading"
            assert offered.process.poll() is None
            await read_and_check(reader, offered, scattered(1))


async def test_servers_that_can_only_send_messages_are_refused_at_once(source: Source) -> None:
    """Without RDMA or one machine UCX would let the source answer every read: see nixl/library.py."""
    with running("reader", encoded(source.remote), UCX_TLS="tcp") as reader:
        _, errors = await asyncio.to_thread(reader.communicate, timeout=PATIENCE_S)
    assert "NIXL can't read from the server with the pages" in errors
    assert source.process.poll() is None


async def test_idle_connections_are_bounded(
    source: Source, connected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton_kv_transfer.transports.nixl.read_thread.MAX_SOURCES", 1)
    offered = NixlSource(pool_of(5), BYTES_PER_BLOCK, NUM_BLOCKS)
    async with made_reader() as reader:
        for _ in range(3):
            await reader.connect(source.remote, PATIENCE_S)
            await reader.connect(offered.remote, PATIENCE_S)
        assert len(reader._thread._connections) == 1
        assert len(connected) == 6
    offered.close()


async def test_close_leaves_nothing(source: Source) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    def num_tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    async with made_reader() as reader:  # what a process' first agent leaves: threads of the libraries
        await reader.connect(source.remote, PATIENCE_S)
    threads, tasks, descriptors = threading.enumerate(), num_tasks(), num_open()
    for _ in range(3):
        async with made_reader() as reader:
            await read_and_check(reader, source, scattered(1))
        offered = NixlSource(pool_of(5), BYTES_PER_BLOCK, NUM_BLOCKS)
        offered.close()
    assert threading.enumerate() == threads
    assert num_open() <= descriptors
    await until(lambda: num_tasks() <= tasks)  # the system takes a moment to end a thread
    assert await refusal(reader, source.remote, scattered(1)) == "nixl"


async def test_close_fails_reads_under_way() -> None:
    reader = NixlReader(num_slots=2)
    with running_source(seed=2) as hanging:
        hanging.stop()
        task = asyncio.create_task(refusal(reader, hanging.remote, scattered(1)))
        waiting = asyncio.create_task(refusal(reader, hanging.remote, scattered(1)))
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await reader.close()
            assert await task == "nixl"
            assert await waiting == "nixl"


async def test_a_call_that_does_not_return_fails_its_read_alone(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    post = nixl_reads._Connection.post

    def post_late(connection: nixl_reads._Connection, read: nixl_reads.Read) -> None:
        assert goes_on.wait(PATIENCE_S)
        post(connection, read)

    monkeypatch.setattr("baton_kv_transfer.transports.nixl.reader.GRACE_S", 0.1)
    async with made_reader(num_slots=1) as reader, asyncio.timeout(PATIENCE_S):
        await reader.connect(source.remote, PATIENCE_S)
        with monkeypatch.context() as patch:
            patch.setattr(nixl_reads._Connection, "post", post_late)
            assert await refusal(reader, source.remote, scattered(1), timeout_s=0.1) == "deadline"
            assert reader._free_slots.empty()  # it may yet be written
        goes_on.set()
        await read_and_check(reader, source, scattered(2))


def test_nixl_takes_no_signals() -> None:
    """UCX would stop at SIGHUP and wait for a debugger."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, by children too
    try:
        with running_source(seed=2) as offered:
            offered.process.send_signal(signal.SIGHUP)
            assert offered.process.wait(10) == -signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, inherited)


def test_without_nixl_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_library, "_MODULES", ("nixl_of_tomorrow",))
    nixl_library.load.cache_clear()
    assert not nixl_library.is_available()
    with pytest.raises(StartupError, match="pip install"):
        NixlSource(pool_of(1), BYTES_PER_BLOCK, NUM_BLOCKS)
    nixl_library.load.cache_clear()


def test_a_source_says_how_large_its_pool_is() -> None:
    with pytest.raises(ValueError, match="blocks"):
        NixlSource(pool_of(1), BYTES_PER_BLOCK, NUM_BLOCKS + 1)
