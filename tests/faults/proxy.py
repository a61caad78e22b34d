"""A TCP proxy that breaks what it carries, where and when a test says so.

It carries HTTP/2 without encryption and reads the client's half of it frame by frame (RFC 9113, section 4.1),
so that a fault can be aimed at what a frame holds. The server's half passes untouched.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType

HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0

_PREFACE_BYTES = 24
_FRAME_HEADER_BYTES = 9
_READ_BYTES = 1 << 16
# With lingering on and no time for it, closing a socket sends RST instead of FIN.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

# Where in a frame, which begins so many bytes after the fault was armed, the fault strikes; None: not in it.
Aim = Callable[[bytes, int], int | None]
# What becomes of the frame from there on, and of the connection; what comes before passes as it is.
Strike = Callable[["Connection", "Fault", bytes], Awaitable[None]]


class Fault:
    """One fault on its way: it strikes once, in whichever connection comes first to where it is aimed at."""

    def __init__(self, strike: Strike, aim: Aim, loop: asyncio.AbstractEventLoop) -> None:
        self.strike = strike
        self.aim = aim
        self.num_passed = 0  # bytes from clients since it was armed
        self.has_struck = threading.Event()
        self.released = asyncio.Event()
        self._loop = loop

    def wait_struck(self, timeout_s: float) -> None:
        """Wait until it has happened; fails the test at the deadline."""
        assert self.has_struck.wait(timeout_s), f"the fault has not happened within {timeout_s} s"

    def release(self) -> None:
        """Let a connection go on that this fault holds."""
        self._loop.call_soon_threadsafe(self.released.set)


class Connection:
    """A client's connection, and the one to the server that it stands for; they end together."""

    def __init__(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        take_aim: Callable[[bytes], tuple[Fault, int] | None],
    ) -> None:
        self._client_reader, self._client_writer = client
        self._server_reader, self._server_writer = server
        self._take_aim = take_aim

    async def run(self) -> None:
        """Carry bytes both ways until one side has ended."""
        ways = [asyncio.create_task(self._carry_up()), asyncio.create_task(self._carry_down())]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in done:
                await way
        except OSError:
            pass  # one side is gone
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._server_writer.close()
            self._client_writer.close()

    async def send(self, data: bytes) -> None:
        """To the server."""
        self._server_writer.write(data)
        await self._server_writer.drain()

    def end_sending(self) -> None:
        """FIN to the server."""
        self._server_writer.write_eof()

    def reset(self) -> None:
        """RST to both."""
        for writer in (self._server_writer, self._client_writer):
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    async def swallow(self) -> None:
        """Read the client to its end, for nothing."""
        while await self._client_reader.read(_READ_BYTES):
            pass

    async def _carry_up(self) -> None:
        """Ends with the client."""
        try:
            await self._pass(await self._client_reader.readexactly(_PREFACE_BYTES))
            while True:
                head = await self._client_reader.readexactly(_FRAME_HEADER_BYTES)
                await self._pass(head + await self._client_reader.readexactly(int.from_bytes(head[:3])))
        except asyncio.IncompleteReadError as rest:
            await self.send(rest.partial)

    async def _pass(self, frame: bytes) -> None:
        aimed = self._take_aim(frame)
        if aimed is None:
            await self.send(frame)
            return
        fault, index = aimed
        await self.send(frame[:index])
        fault.has_struck.set()
        await fault.strike(self, fault, frame[index:])

    async def _carry_down(self) -> None:
        """Ends with the server."""
        while data := await self._server_reader.read(_READ_BYTES):
            self._client_writer.write(data)
            await self._client_writer.drain()


class FaultProxy:
    """Listens on a port of its own and carries connections to another one, on a thread of its own."""

    def __init__(self, server_port: int) -> None:
        self.address = ""
        self._server_port = server_port
        self._fault: Fault | None = None
        self._failure: BaseException | None = None
        self._is_listening = threading.Event()
        self._connections: set[Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fault proxy")

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._is_listening.wait(START_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(START_TIMEOUT_S)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def arm(self, strike: Strike, aim: Aim) -> Fault:
        """Make ready for one fault, in place of an earlier one that has not struck."""
        fault = Fault(strike, aim, self._loop)
        self._fault = fault
        return fault

    def clear(self) -> None:
        """No fault any more, and no connection that has seen one."""
        self._fault = None
        self._loop.call_soon_threadsafe(self._reset_all)

    def _reset_all(self) -> None:
        for connection in self._connections:
            connection.reset()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as failure:
                self._failure = failure

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:

            def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                tasks.create_task(self._carry(reader, writer))

            server = await asyncio.start_server(connected, HOST, 0)
            self.address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
            self._is_listening.set()
            await self._closing.wait()
            server.close()
            self._reset_all()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection(HOST, self._server_port)
        except OSError:
            writer.close()  # as nobody listens behind it, nobody does here
            return
        connection = Connection((reader, writer), server, self._take_aim)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def _take_aim(self, frame: bytes) -> tuple[Fault, int] | None:
        """The armed fault and where in the frame it strikes, if in this one; it is armed no longer then."""
        fault = self._fault
        if fault is None:
            return None
        index = fault.aim(frame, fault.num_passed)
        fault.num_passed += len(frame)
        if index is None:
            return None
        self._fault = None
        return fault, index
