"""One cluster for the whole folder; each test finds it whole, and leaves it so."""

from collections.abc import Iterator

import pytest

from tests.faults.cluster import FaultyCluster, running_faulty_cluster
from tests.faults.scene import BYSTANDER, NEIGHBOUR, VICTIM, Scene
from tests.faults.traffic import Traffic


@pytest.fixture(scope="package")
def cluster() -> Iterator[FaultyCluster]:
    with running_faulty_cluster("grpc") as cluster:
        yield cluster


@pytest.fixture(scope="package")
def traffic(cluster: FaultyCluster) -> Traffic:
    traffic = Traffic(cluster)
    traffic.learn(VICTIM, NEIGHBOUR, BYSTANDER)
    return traffic


@pytest.fixture
def scene(cluster: FaultyCluster, traffic: Traffic) -> Iterator[Scene]:
    scene = Scene(cluster, traffic)
    yield scene
    cluster.proxy.clear()
    cluster.revive()
