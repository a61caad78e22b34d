"""Connections that break in the middle of a KV transfer, or carry something else than was sent.

The transfer is tried again, and no client notices; no page is lost.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.faults import kinds
from tests.faults.cluster import STALL_TIMEOUT_S
from tests.faults.proxy import Aim, Strike
from tests.faults.scene import MID_TRANSFER_BYTES, Scene

EXPONENT = 0x40  # in a float32's highest byte: a factor of 2**128, or of 2**-128


@dataclass(frozen=True)
class Break:
    """A fault after which the transfer can't be committed."""

    strike: Strike
    aim: Callable[[int], Aim]
    seen_as: str = "aborted"  # by decode
    stream: bool = False  # what the client has asked for


BREAKS = {
    "cut": Break(kinds.cut, kinds.after),
    "cut, streamed": Break(kinds.cut, kinds.after, stream=True),
    "truncated": Break(kinds.truncate, kinds.after),
    "bytes twice": Break(kinds.repeat, kinds.after),
    "pages twice": Break(kinds.repeat, kinds.at_pages, "duplicate"),
    "payload changed": Break(kinds.flip(EXPONENT), kinds.in_payload, "checksum"),
    "payload changed, streamed": Break(kinds.flip(EXPONENT), kinds.in_payload, "checksum", stream=True),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_transfer_that_breaks(scene: Scene, name: str) -> None:
    broken = BREAKS[name]
    scene.strike(broken.strike, broken.aim(MID_TRANSFER_BYTES), stream=broken.stream)
    scene.require_right()
    scene.wait_idle()
    scene.wait_outcome("prefill", "refused")
    scene.wait_outcome("decode", broken.seen_as)
    if broken.aim is not kinds.after:  # one message was wrong: nobody else's transfer was touched
        assert scene.num_outcomes("decode", broken.seen_as) == 1
    scene.require_service()


def test_a_first_token_that_changes_on_its_way(scene: Scene) -> None:
    scene.strike(kinds.flip(1), kinds.in_first_token())
    scene.require_right()
    scene.wait_outcome("decode", "checksum")
    scene.wait_idle()
    scene.require_service()


def test_a_transfer_that_is_late(scene: Scene) -> None:
    scene.strike(kinds.delay(STALL_TIMEOUT_S / 2), kinds.after(MID_TRANSFER_BYTES))
    scene.require_right()
    scene.wait_idle()
    assert scene.num_outcomes("prefill", "refused") == 0
    scene.require_service()


@pytest.mark.parametrize("goes_on", [False, True], ids=["for good", "then goes on"])
def test_a_connection_that_stalls(scene: Scene, goes_on: bool) -> None:
    scene.strike(kinds.hold, kinds.after(MID_TRANSFER_BYTES))
    scene.require_right()
    scene.wait_outcome("prefill", "refused")
    if goes_on:
        scene.fault.release()  # the rest comes now, when nobody waits for it
    scene.wait_idle()  # else decode hears nothing of it on that connection
    scene.require_service()


# Its pings are answered as ever, and no call that begins on it ends well.
@pytest.mark.parametrize(
    ("aim", "is_new"), [(kinds.in_stream_number, False), (kinds.in_path, True)], ids=["number", "path"]
)
def test_a_connection_that_is_spoilt(scene: Scene, aim: Callable[[], Aim], is_new: bool) -> None:
    scene.strike(kinds.flip(0x40), aim(), on_new_connection=is_new)
    scene.require_right()
    scene.wait_outcome("prefill", "refused")
    scene.wait_idle()
    scene.require_service()


@pytest.mark.parametrize("seed", range(4))
def test_any_bit_anywhere(scene: Scene, seed: int) -> None:
    rng = random.Random(seed)
    if seed % 2:
        aim, where = kinds.after(index := rng.randrange(2 * MID_TRANSFER_BYTES)), f"byte {index}"
    else:  # where the headers are: of HTTP/2, gRPC and the message
        number, index = rng.randrange(18), rng.randrange(70)
        aim, where = kinds.in_frame(number, index), f"byte {index} of frame {number}"
    mask = 1 << rng.randrange(8)
    print(f"seed {seed}: {where} ^ {mask:#04x}")
    scene.strike(kinds.flip(mask), aim)
    scene.victim.require_right_or_clean()
    scene.neighbour.require_right_or_clean()
    scene.bystander.require_right()
    scene.wait_idle()
    scene.wait_service()
