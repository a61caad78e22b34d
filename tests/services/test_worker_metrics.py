"""What /metrics says of workers: under names that stay, in tokens where vLLM counts tokens."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from baton.config import worker_name
from baton_router.pool_metrics import PoolCollector
from tests.services.cluster import Cluster, cluster, until
from tests.services.prompts import prompt_of


def samples(running: Cluster, name: str) -> dict[tuple[str, str], float]:
    """Values of a metric by role and worker, as Prometheus reads them; no two may share their labels."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(running.pool, running.admission))
    text = generate_latest(registry).decode()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                labels = sample.labels["role"], sample.labels["worker"]
                assert labels not in found
                found[labels] = sample.value
    return found


async def test_workers_are_labelled_by_their_ids_which_outlive_their_sessions() -> None:
    async with cluster() as running:
        names = {("prefill", "prefill-0"), ("decode", "decode-0")}
        assert samples(running, "baton_worker_up") == dict.fromkeys(names, 1)
        assert samples(running, "baton_worker_num_running").keys() == names
        await running.decode.stop()
        await until(lambda: running.links[1].worker is None)
        assert samples(running, "baton_worker_up") == {("prefill", "prefill-0"): 1, ("decode", "decode-0"): 0}
        await running.decode.start()
        await running.connected()
        assert samples(running, "baton_worker_up") == dict.fromkeys(names, 1)


async def test_a_worker_that_never_came_has_the_name_of_its_address() -> None:
    async with cluster() as running:
        for link in running.links:
            assert link.name == f"{link.role_name}-0"
        await running.stop_router()
        for worker in running.workers:
            await worker.stop()
        await running.start_router()
        names = {(link.role_name, link.name) for link in running.links}
        workers = (("prefill", running.prefill), ("decode", running.decode))
        assert names == {(role, worker_name(worker.address)) for role, worker in workers}
        assert samples(running, "baton_worker_up") == dict.fromkeys(names, 0)


async def test_two_workers_of_one_name_are_told_apart() -> None:
    """Prometheus throws away an answer that has the same labels twice."""
    async with cluster(num_decodes=2) as running:
        first, second = (f"decode-0@{worker.address}" for worker in running.decodes)
        names = {("prefill", "prefill-0"), ("decode", first), ("decode", second)}
        assert samples(running, "baton_worker_up") == dict.fromkeys(names, 1)


@pytest.mark.parametrize(
    ("sampling", "queried", "hit"),
    [({}, 2 * 18, 16), ({"num_prompt_logprobs": 0}, 18, 0)],  # the latter is looked up nowhere
    ids=["looked up", "computed whole"],
)
async def test_the_prefix_cache_is_counted_in_tokens(
    sampling: dict[str, Any], queried: int, hit: int
) -> None:
    async with cluster() as running:
        prompt = prompt_of(18)
        await running.ask(running.request(prompt, max_tokens=1))
        await running.ask(running.request(prompt, max_tokens=1, **sampling))
        queries, hits = (
            samples(running, f"baton_worker_prefix_cache_{what}_total") for what in ("queries", "hits")
        )
        assert (queries["prefill", "prefill-0"], hits["prefill", "prefill-0"]) == (queried, hit)
        assert queries["decode", "decode-0"] == 0
