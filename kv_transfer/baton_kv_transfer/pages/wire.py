"""Transfer frames as bytes, without copying payloads more often than gRPC itself does.

What is written and read here is protobuf's own encoding (https://protobuf.dev/programming-guides/encoding) of
TransferFrame, and any stub reads and writes it too. But a stub copies a payload twice on either side; a frame
with pages is therefore put together, and taken apart, by hand.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crc32c import crc32c
from google.protobuf.message import DecodeError

from baton.core.errors import TransferRefused
from baton.core.reservation import FramePlace
from baton.v1 import transfer_pb2

PUSH_METHOD = "/baton.v1.Transfer/Push"

# Wire type 2: a value with its length before it.
_PAGES_TAG = transfer_pb2.TransferFrame.PAGES_FIELD_NUMBER << 3 | 2
_PAYLOAD_TAG = transfer_pb2.Pages.PAYLOAD_FIELD_NUMBER << 3 | 2


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as it came; `payload` is that of its pages, which `message` has without."""

    message: transfer_pb2.TransferFrame
    payload: memoryview


def pages_message(place: FramePlace, checksum: int) -> transfer_pb2.Pages:
    """The head of a frame of pages."""
    return transfer_pb2.Pages(
        first_block=place.first_block,
        num_blocks=place.num_blocks,
        first_layer=place.first_layer,
        num_layers=place.num_layers,
        crc32c=checksum,
    )


def place_of(pages: transfer_pb2.Pages) -> FramePlace:
    """Inverse of `pages_message`."""
    return FramePlace(pages.first_block, pages.num_blocks, pages.first_layer, pages.num_layers)


def seal(commit: transfer_pb2.Commit, scales: Sequence[float] = ()) -> None:
    """Add a commit's checksum: decode goes on from its tokens, which matter as much as pages do.

    So do the `scales` of the pages (KVLayout) that the transfer was opened with: they are in it too.
    """
    commit.crc32c = _commit_crc32c(commit, scales)


def check_seal(commit: transfer_pb2.Commit, scales: Sequence[float] = ()) -> None:
    """Raises TransferRefused where a commit's checksum is wrong or missing."""
    if not commit.HasField("crc32c"):
        raise TransferRefused("checksum", "the commit arrived without its checksum")
    if commit.crc32c != _commit_crc32c(commit, scales):
        raise TransferRefused("checksum", "the commit arrived corrupted")


def _commit_crc32c(commit: transfer_pb2.Commit, scales: Sequence[float]) -> int:
    numbers = (len(commit.first_tokens), *commit.first_tokens, *commit.finished_choices)
    return crc32c(struct.pack(f"<{len(numbers)}I{len(scales)}f", *numbers, *scales))


def encode_pages(
    transfer_id: bytes, epoch: int, pages: transfer_pb2.Pages, parts: Iterable[memoryview], num_bytes: int
) -> bytes:
    """A TransferFrame with pages whose payload is `parts`, `num_bytes` in all: one copy."""
    head = transfer_pb2.TransferFrame(transfer_id=transfer_id, epoch=epoch).SerializeToString()
    inner = pages.SerializeToString() + _varint(_PAYLOAD_TAG) + _varint(num_bytes)
    outer = _varint(_PAGES_TAG) + _varint(len(inner) + num_bytes)
    return b"".join((head, outer, inner, *parts))


def decode(wire: bytes) -> Frame:
    """A frame of any kind, its payload a view of `wire`. Raises TransferRefused where it is none."""
    try:
        head, pages = _split(memoryview(wire), _PAGES_TAG)
        message = transfer_pb2.TransferFrame.FromString(head)
        if pages is None:
            return Frame(message, memoryview(b""))
        pages_head, payload = _split(pages, _PAYLOAD_TAG)
        message.pages.MergeFromString(pages_head)
        message.pages.SetInParent()
        return Frame(message, memoryview(b"") if payload is None else payload)
    except (DecodeError, ValueError, IndexError):
        raise TransferRefused("frame", f"{len(wire)} bytes that are no transfer frame") from None


def _split(fields: memoryview, wanted: int) -> tuple[bytes, memoryview | None]:
    """The encoded fields without those tagged `wanted`, and the value of the last of these."""
    others, value = [], None
    at = 0
    while at < len(fields):
        tag, start = _read_varint(fields, at)
        end = _end_of_value(fields, tag & 7, start)
        if end > len(fields):
            raise ValueError("a field ends outside its message")
        if tag == wanted:
            _, start = _read_varint(fields, start)
            value = fields[start:end]
        else:
            others.append(fields[at:end])
        at = end
    return b"".join(others), value


def _end_of_value(fields: memoryview, wire_type: int, start: int) -> int:
    match wire_type:
        case 0:
            return _read_varint(fields, start)[1]
        case 1:
            return start + 8
        case 2:
            length, start = _read_varint(fields, start)
            return start + length
        case 5:
            return start + 4
    raise ValueError(f"wire type {wire_type}")


def _read_varint(fields: memoryview, at: int) -> tuple[int, int]:
    """A value and where it ends. Raises ValueError or IndexError where there is none."""
    value = shift = 0
    while True:
        byte = fields[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
