"""One cluster for all tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.e2e.processes import Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster
