"""A second process with one end of a pair, told what to do over a connection: a line of JSON each time."""

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.core.errors import TransferRefused
from baton_kv_transfer.transports.pair import process_group
from baton_kv_transfer.transports.pair.receiving_end import Landed

DEADLINE_S = 20.0
# Processes are forked from one that has torch loaded and nothing else.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Options:
    max_bytes: int = 1 << 19
    stall_timeout_s: float = 60.0
    num_buffers: int = 3


def content(num_bytes: int, seed: int) -> memoryview:
    """Bytes that are not 0, so that what has arrived can be told from fresh memory."""
    return (np.frombuffer(np.random.default_rng(seed).bytes(num_bytes), np.uint8) | 1).data


def digest(payload: memoryview) -> str:
    return hashlib.sha256(payload).hexdigest()


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, what: str, *values: Any) -> None:
        self._writer.write(json.dumps([what, *values]).encode() + b"\n")

    async def hear(self) -> list[Any]:
        """The next line; empty where the other has gone."""
        line = await self._reader.readline()
        return json.loads(line) if line.endswith(b"\n") else []


class Peer:
    """The second process, as seen from the first."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        self.say = connection.say

    async def hear(self, what: str) -> list[Any]:
        async with asyncio.timeout(DEADLINE_S):
            said, *values = await self._connection.hear()
        assert said == what, (said, values)
        return values

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    async def kill(self) -> None:
        self._process.kill()
        await asyncio.to_thread(self._process.join, DEADLINE_S)


@contextlib.asynccontextmanager
async def running_peer(role: str, options: Options) -> AsyncIterator[Peer]:
    """A second process with a "sender" or "receiver"."""
    arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *ends: arrived.set_result(Connection(*ends)), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    process = _context.Process(target=_main, args=(role, port, options), daemon=True)
    await asyncio.to_thread(process.start)
    try:
        async with asyncio.timeout(DEADLINE_S):
            peer = Peer(process, await arrived)
        yield peer
    finally:
        process.kill()
        await asyncio.to_thread(process.join, DEADLINE_S)
        server.close()


def _main(role: str, port: int, options: Options) -> None:
    asyncio.run({"sender": _sender, "receiver": _receiver}[role](port, options))


async def _receiver(port: int, options: Options) -> None:
    first = Connection(*await asyncio.open_connection("127.0.0.1", port))
    meeting = process_group.Meeting("127.0.0.1", max_bytes=options.max_bytes)
    first.say("meeting", meeting.port)

    def landed(index: int, message: Landed | TransferRefused) -> None:
        if isinstance(message, TransferRefused):
            first.say("refused", index, message.reason)
        else:
            first.say("landed", index, digest(message.payload))
            message.release()

    end = await meeting.receiving_end(
        "cpu", landed, lambda error: first.say("broken", str(error)), stall_timeout_s=options.stall_timeout_s
    )
    index = 0
    while command := await first.hear():
        match command:
            case ["expect", num_bytes, crc]:
                end.expect(num_bytes, crc, index)
                index += 1
            case ["close"]:
                await end.close()
                first.say("closed")


async def _sender(port: int, options: Options) -> None:
    first = Connection(*await asyncio.open_connection("127.0.0.1", port))
    _, meeting_port = await first.hear()
    end = await process_group.sending_end(
        "127.0.0.1",
        meeting_port,
        "cpu",
        lambda error: first.say("broken", str(error)),
        stall_timeout_s=options.stall_timeout_s,
        max_bytes=options.max_bytes,
    )

    async def send(num_bytes: int, seed: int) -> None:
        source = content(num_bytes, seed)
        try:
            await end.send(
                num_bytes,
                lambda memory: np.copyto(np.frombuffer(memory, np.uint8), source),
                lambda crc: first.say("announce", num_bytes, crc),
            )
        except TransferRefused as error:
            first.say("refused", error.reason)

    async with asyncio.TaskGroup() as sends:
        while command := await first.hear():
            match command:
                case ["send", num_bytes, seed]:
                    sends.create_task(send(num_bytes, seed))
                case ["close"]:
                    await end.close()
                    first.say("closed")
