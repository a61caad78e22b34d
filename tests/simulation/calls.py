"""Push calls in virtual time: the way of frames between the two sides, and what befalls them there."""

from typing import TYPE_CHECKING, Protocol

from baton.core.errors import TransferRefused
from baton_kv_transfer.pages import wire
from tests.simulation.receiver import ServerCall
from tests.simulation.schedule import HOPS, LONG_STALLS, STALLS, WRITES, Fault

if TYPE_CHECKING:
    from tests.simulation.world import World

NOTICES = (0.0005, 0.003, 0.03, 12.0)  # until an end of a broken connection finds out


class Sender(Protocol):
    """Who hears of a call's end."""

    def opened(self, call: "PushCall") -> None:
        """The receiver has taken the frame that opens the transfer."""
        ...

    def answered(self, call: "PushCall") -> None:
        """The call is over; see its `answer`."""
        ...


class PushCall:
    """One call: frames in order one way, one answer the other."""

    def __init__(self, world: "World", sender: Sender | None, name: str) -> None:
        self.name = name
        self.answer: bool | None = None  # what the sender knows: acknowledged, or failed
        self.has_opened = False  # what the sender knows
        self.server: ServerCall | None = None
        self.sent: list[tuple[bytes, str, int]] = []  # frame, kind, bytes of payload
        self._world = world
        self._sender = sender
        self._arrives = 0.0
        self._is_broken = False
        self._has_corrupted_head = False
        world.calls.append(self)

    # --- the sender's side --------------------------------------------------------------------------

    def write(self, frame: bytes, kind: str, payload_bytes: int = 0) -> float:
        """Send a frame; returns after how long the write is complete."""
        world = self._world
        self.sent.append((frame, kind, payload_bytes))
        byte = world.schedule.byte()
        fault = world.faults[byte >> 3]
        delay, written, is_corrupted = HOPS[byte & 7], WRITES[byte & 7], False
        if fault is not None:
            world.fault(fault, self.name, kind)
            match fault:
                case Fault.LOST:
                    return written
                case Fault.DUPLICATED:
                    world.after(delay + 0.0015, self._arrive, frame, False)
                case Fault.OVERTAKEN:
                    world.after(delay + 0.01, self._arrive, frame, False)
                    return written
                case Fault.CORRUPTED:
                    frame, is_corrupted = self._corrupt(frame, kind, payload_bytes, byte & 7)
                case Fault.STALLED:
                    delay = written = STALLS[byte & 3]
                case Fault.HELD_UP:
                    delay = written = LONG_STALLS[byte & 3]
                case Fault.CUT:
                    self.cut(byte)
                case Fault.ECHOED:
                    world.after(delay + STALLS[byte & 3], world.echo, self)
        self._arrives = max(self._arrives, world.now + delay)
        world.at(self._arrives, self._arrive, frame, is_corrupted)
        return written

    def half_close(self) -> None:
        """No frame comes after those that were written."""
        self._arrives = max(self._arrives, self._world.now + HOPS[0])
        self._world.at(self._arrives, self._arrive_end)

    def cancel(self) -> None:
        """The sender ends it; what it has written arrives before."""
        if self.answer is None:
            self.answer = False
            self._sender = None
            delay = self._world.hop()
            self._world.at(max(self._arrives, self._world.now + delay), self._arrive_reset)
        self._forget()

    def replay(self, sent: list[tuple[bytes, str, int]]) -> None:
        """Send what another call has sent."""
        for frame, kind, payload_bytes in sent:
            self.write(frame, kind, payload_bytes)
        self._world.at(max(self._arrives, self._world.now) + 0.02, self.cancel)

    # --- in between ---------------------------------------------------------------------------------

    def cut(self, number: int) -> None:
        """Break it; what is on its way is lost, and each end finds out for itself."""
        if not self._is_broken:
            self._is_broken = True
            if self.server is not None:
                self._world.after(NOTICES[number & 3], self.server.broken)
            self._world.after(NOTICES[number >> 2 & 3], self._hear, False)

    def lose_server(self, number: int) -> None:
        """The receiver has gone."""
        if self.server is not None and not self._is_broken:
            self._is_broken = True
            self._world.after(NOTICES[number & 3], self._hear, False)

    def lose_sender(self, number: int) -> None:
        """The sender has gone."""
        self._sender = None
        self._forget()
        self._world.at(max(self._arrives, self._world.now + NOTICES[number & 3]), self._arrive_reset)

    def _corrupt(self, frame: bytes, kind: str, payload_bytes: int, bit: int) -> tuple[bytes, bool]:
        """One bit of a frame flipped, and whether that has to be noticed."""
        position = self._world.schedule.byte() * len(frame) // 256
        in_head = position < len(frame) - payload_bytes
        if in_head and not self._may_corrupt_head(kind):
            return frame, False
        changed = bytearray(frame)
        changed[position] ^= 1 << bit
        self._world.count[f"corrupted {'head' if in_head else 'payload'} of {kind}"] += 1
        must_be_noticed = kind in ("pages", "shipped", "commit") and _means_else(bytes(changed), frame)
        return bytes(changed), must_be_noticed

    def _may_corrupt_head(self, kind: str) -> bool:
        """Heads have no checksum: what is put in another's place is noticed because its own stays empty, but
        not if two take each other's."""
        if self._has_corrupted_head or Fault.DUPLICATED in self._world.faults:
            return False
        self._has_corrupted_head = kind != "open"
        return True

    # --- the receiver's side ------------------------------------------------------------------------

    def _arrive(self, frame: bytes, is_corrupted: bool) -> None:
        if self._is_broken:
            return
        if self.server is None:
            self.server = ServerCall(self._world, self._world.decode, self, self.name)
        self.server.take(frame, is_corrupted)

    def _arrive_end(self) -> None:
        if self.server is not None and not self._is_broken:
            self.server.half_closed()

    def _arrive_reset(self) -> None:
        self._is_broken = True
        if self.server is not None:
            self.server.broken()

    def send_opened(self) -> None:
        """The receiver has taken the frame that opens the transfer."""
        self._world.after(self._world.hop(), self._hear_opened)

    def send_answer(self, is_ok: bool) -> None:
        """The receiver's only answer."""
        if not self._is_broken:
            self._is_broken = True
            self._world.after(self._world.hop(), self._hear, is_ok)

    # --- back at the sender -------------------------------------------------------------------------

    def _hear_opened(self) -> None:
        self.has_opened = True
        if self._sender is not None and self.answer is None:
            self._sender.opened(self)

    def _hear(self, is_ok: bool) -> None:
        if self.answer is None:
            self.answer = is_ok
            self._forget()
            if self._sender is not None:
                self._sender.answered(self)

    def _forget(self) -> None:
        if self in self._world.calls:
            self._world.calls.remove(self)


def _means_else(changed: bytes, frame: bytes) -> bool:
    """False for a bit that protobuf ignores."""
    try:
        return wire.decode(changed) != wire.decode(frame)
    except TransferRefused:
        return True
