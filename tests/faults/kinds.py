"""What the proxy can do to a transfer, and where: aims say in which byte, strikes say what happens there."""

import asyncio
from collections.abc import Callable

from google.protobuf.message import DecodeError

from baton.v1.transfer_pb2 import TransferFrame
from tests.faults.proxy import Aim, Connection, Fault, Strike

# HTTP/2 (RFC 9113, section 4.1) and the gRPC message in a frame's payload.
_FRAME_HEADER_BYTES = 9
_DATA = 0
_HEADERS = 1
_STREAM_NUMBER = 6  # its second byte of four
_MESSAGE_HEADER_BYTES = 5
_HEADERS_BYTES = _FRAME_HEADER_BYTES + _MESSAGE_HEADER_BYTES
_FLOAT32_BYTES = 4

# --- aims: where --------------------------------------------------------------------------------------


def after(num_bytes: int) -> Aim:
    """At this byte of all that clients send from now on, whatever it is."""

    def aim(frame: bytes, num_passed: int) -> int | None:
        index = num_bytes - num_passed
        return index if index < len(frame) else None

    return aim


def in_frame(number: int, index: int) -> Aim:
    """At a byte of the frame with this number, or at its last one, counted from now on."""
    num_frames = 0

    def aim(frame: bytes, num_passed: int) -> int | None:
        nonlocal num_frames
        num_frames += 1
        return min(index, len(frame) - 1) if num_frames > number else None

    return aim


def in_stream_number() -> Aim:
    """In the next call's number on its connection, in a bit that it won't come to for long."""
    return lambda frame, num_passed: _STREAM_NUMBER if frame[3] == _HEADERS else None


def in_path() -> Aim:
    """In the next method name that stands in a call's headers in full: the first call's of a connection."""
    path = b"/baton.v1.Transfer/Push"

    def aim(frame: bytes, num_passed: int) -> int | None:
        return frame.index(path) + len(path) - 1 if frame[3] == _HEADERS and path in frame else None

    return aim


def at_pages(num_bytes: int) -> Aim:
    """At the start of the first frame with pages that begins after so many bytes."""
    return _in_message(num_bytes, "pages", lambda frame, message: 0)


def in_payload(num_bytes: int) -> Aim:
    """In the middle of the payload of such a frame: in the highest byte of a float32."""

    def middle(frame: bytes, message: TransferFrame) -> int:
        num_floats = len(message.pages.payload) // _FLOAT32_BYTES
        return len(frame) - 1 - num_floats // 2 * _FLOAT32_BYTES

    return _in_message(num_bytes, "pages", middle)


def in_first_token() -> Aim:
    """In the token that a commit tells decode to go on from."""

    def token(frame: bytes, message: TransferFrame) -> int:
        [token_id] = message.commit.first_tokens
        packed = TransferFrame(commit={"first_tokens": [token_id]}).commit.SerializeToString()
        return frame.rindex(packed) + 2  # after the field's key and length

    return _in_message(0, "commit", token)


def _in_message(num_bytes: int, body: str, index_in: Callable[[bytes, TransferFrame], int]) -> Aim:
    def aim(frame: bytes, num_passed: int) -> int | None:
        message = _whole_message(frame) if num_passed >= num_bytes else None
        if message is None or message.WhichOneof("body") != body:
            return None
        return index_in(frame, message)

    return aim


def _whole_message(frame: bytes) -> TransferFrame | None:
    """The message of a DATA frame that holds exactly one."""
    header, message = frame[_FRAME_HEADER_BYTES:][:_MESSAGE_HEADER_BYTES], frame[_HEADERS_BYTES:]
    if frame[3] != _DATA or int.from_bytes(header[1:]) != len(message):
        return None
    try:
        return TransferFrame.FromString(message)
    except DecodeError:
        return None


# --- strikes: what -------------------------------------------------------------------------------------


async def cut(connection: Connection, fault: Fault, rest: bytes) -> None:
    """RST."""
    connection.reset()


async def truncate(connection: Connection, fault: Fault, rest: bytes) -> None:
    """FIN, and the rest of what the client sends is lost."""
    connection.end_sending()
    await connection.swallow()


def flip(mask: int) -> Strike:
    """Change bits of one byte."""

    async def strike(connection: Connection, fault: Fault, rest: bytes) -> None:
        await connection.send(bytes([rest[0] ^ mask]) + rest[1:])

    return strike


async def repeat(connection: Connection, fault: Fault, rest: bytes) -> None:
    """What is left of the frame comes twice."""
    await connection.send(rest + rest)


def delay(seconds: float) -> Strike:
    """Nothing for a while."""

    async def strike(connection: Connection, fault: Fault, rest: bytes) -> None:
        await asyncio.sleep(seconds)
        await connection.send(rest)

    return strike


async def hold(connection: Connection, fault: Fault, rest: bytes) -> None:
    """Nothing until the fault is released; then all that was held back."""
    await fault.released.wait()
    await connection.send(rest)


async def hold_then_cut(connection: Connection, fault: Fault, rest: bytes) -> None:
    """Nothing until the fault is released; then RST."""
    await fault.released.wait()
    connection.reset()
