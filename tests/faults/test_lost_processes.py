"""Servers that die or stand still in the middle of a KV transfer."""

import pytest

from tests.e2e.processes import wait_until
from tests.faults import kinds
from tests.faults.scene import MID_TRANSFER_BYTES, Scene

# A ping after 5 s of silence, and 5 s for its answer.
LOST_WITHIN_S = 12.0


def test_kill_prefill(scene: Scene) -> None:
    scene.strike(kinds.hold_then_cut, kinds.after(MID_TRANSFER_BYTES))
    scene.cluster.kill("prefill")
    scene.fault.release()
    scene.victim.require_right_or_clean()
    scene.neighbour.require_right_or_clean()
    scene.bystander.require_right()  # it had left prefill
    scene.wait_outcome("decode", "aborted")
    scene.cluster.revive()
    scene.wait_idle()
    scene.require_service()


def test_kill_decode(scene: Scene) -> None:
    scene.strike(kinds.hold, kinds.after(MID_TRANSFER_BYTES))
    scene.cluster.kill("decode")
    scene.require_right_or_clean()
    scene.wait_outcome("prefill", "refused", "aborted")  # by the connection, or first by the router
    scene.cluster.revive()
    scene.wait_idle()
    scene.require_service()


# What the server that goes on counts, by the one that stands still.
GIVEN_UP = {"prefill": ("decode", "deadline"), "decode": ("prefill", "refused")}


@pytest.mark.parametrize("role", GIVEN_UP)
def test_stop_until_the_transfer_is_given_up(scene: Scene, role: str) -> None:
    scene.strike(kinds.hold, kinds.after(MID_TRANSFER_BYTES))
    with scene.cluster.stopped(role):
        scene.fault.release()
        scene.wait_outcome(*GIVEN_UP[role])
    scene.require_right()
    scene.wait_idle()
    scene.require_service()


def test_stop_until_the_router_gives_the_server_up(scene: Scene) -> None:
    scene.strike(kinds.hold, kinds.after(MID_TRANSFER_BYTES))
    with scene.cluster.stopped("decode"):
        scene.fault.release()
        wait_until(lambda: not scene.cluster.is_ready(), "the router misses decode", LOST_WITHIN_S)
        scene.require_right_or_clean()
    scene.cluster.wait_ready()
    scene.wait_idle()
    scene.require_service()
