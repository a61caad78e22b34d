"""Faults while pages travel beside gRPC: the processes are real, and so are the ways between them.

The proxy carries what is gRPC of such a transfer: its announcements and its commit. What has to hold is the
same as for pages over gRPC.
"""

import importlib.util
from collections.abc import Iterator

import pytest

from tests.e2e.processes import wait_until
from tests.faults import kinds
from tests.faults.cluster import FaultyCluster, running_faulty_cluster
from tests.faults.proxy import Strike
from tests.faults.scene import BYSTANDER, NEIGHBOUR, VICTIM, Scene
from tests.faults.traffic import Traffic

TRANSPORTS = [
    "nccl",
    pytest.param(
        "nixl",
        marks=pytest.mark.skipif(importlib.util.find_spec("nixl_cu13") is None, reason="NIXL is not here"),
    ),
]
# Of what prefill says on its connections while the victim's pages travel: some of them are announced by then.
MID_TRANSFER_BYTES = 700
PAIR_MADE_WITHIN_S = 15.0


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cluster(transport: str) -> Iterator[FaultyCluster]:
    with running_faulty_cluster(transport) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def traffic(cluster: FaultyCluster) -> Traffic:
    traffic = Traffic(cluster)
    traffic.learn(VICTIM, NEIGHBOUR, BYSTANDER)
    return traffic


@pytest.fixture
def scene(cluster: FaultyCluster, traffic: Traffic, transport: str) -> Iterator[Scene]:
    before = cluster.num_bytes_by(transport)

    def is_used() -> bool:
        traffic.start(VICTIM).require_right()
        return cluster.num_bytes_by(transport) > before

    wait_until(is_used, f"pages travel by {transport}", PAIR_MADE_WITHIN_S)
    scene = Scene(cluster, traffic)
    yield scene
    cluster.proxy.clear()
    cluster.revive()


@pytest.mark.parametrize("strike", [kinds.cut, kinds.hold], ids=lambda strike: strike.__name__)
def test_announcements_that_break_off(scene: Scene, strike: Strike) -> None:
    scene.strike(strike, kinds.after(MID_TRANSFER_BYTES))
    scene.require_right()
    scene.wait_idle()
    scene.wait_outcome("prefill", "refused")
    scene.require_service()


def test_a_first_token_that_changes_on_its_way(scene: Scene) -> None:
    scene.strike(kinds.flip(1), kinds.in_first_token())
    scene.require_right()
    scene.wait_outcome("decode", "checksum")
    scene.wait_idle()
    scene.require_service()


def test_kill_prefill(scene: Scene) -> None:
    scene.strike(kinds.hold_then_cut, kinds.after(MID_TRANSFER_BYTES))
    scene.cluster.kill("prefill")
    scene.fault.release()
    scene.victim.require_right_or_clean()
    scene.neighbour.require_right_or_clean()
    scene.bystander.require_right()
    scene.cluster.revive()
    scene.wait_idle()
    scene.require_service()


def test_kill_decode(scene: Scene) -> None:
    scene.strike(kinds.hold, kinds.after(MID_TRANSFER_BYTES))
    scene.cluster.kill("decode")
    scene.require_right_or_clean()
    scene.wait_outcome("prefill", "refused", "aborted")
    scene.cluster.revive()
    scene.wait_idle()
    scene.require_service()


@pytest.mark.parametrize(("role", "given_up"), [("prefill", "decode"), ("decode", "prefill")])
def test_stop_until_the_transfer_is_given_up(scene: Scene, role: str, given_up: str) -> None:
    scene.strike(kinds.hold, kinds.after(MID_TRANSFER_BYTES))
    with scene.cluster.stopped(role):
        scene.fault.release()
        scene.wait_outcome(given_up, "refused", "deadline", "aborted", "pair")
    scene.require_right()
    scene.wait_idle()
    scene.require_service()
