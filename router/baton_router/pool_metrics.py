"""The workers in the router's /metrics, read when Prometheus asks."""

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.v1 import worker_pb2
from baton_router.requests.admission import Admission
from baton_router.workers.pool import WorkerPool
from baton_router.workers.worker_link import WorkerLink

_LABELS = ("role", "worker")
# Of worker.proto's Load: a metric's name, what it is, and its value.
_LoadMetrics = dict[str, tuple[str, Callable[[worker_pb2.Load], float]]]
_GAUGES: _LoadMetrics = {
    "num_running": ("Sequences in the worker's batch.", lambda load: load.num_running),
    "num_waiting": ("Requests that wait on the worker.", lambda load: load.num_waiting),
    "num_reserved": ("Requests whose pages wait for their KV.", lambda load: load.num_reserved),
    "num_blocks": ("KV pages of the worker.", lambda load: load.num_blocks),
    "num_free_blocks": (
        "KV pages that no request holds, cached ones included.",
        lambda load: load.num_free_blocks,
    ),
}
_COUNTERS: _LoadMetrics = {
    "num_preemptions": (
        "Sequences that lost their pages and computed them again.",
        lambda load: load.num_preemptions,
    ),
    "prefix_cache_queries": (
        "Tokens of requests that were looked up in the prefix cache.",
        lambda load: load.prefix_cache_queries,
    ),
    "prefix_cache_hits": ("Tokens found in the prefix cache.", lambda load: load.prefix_cache_hits),
    "transfer_bytes": ("KV bytes sent or received.", lambda load: load.transfer_bytes),
    "delta_bytes_saved": (
        "KV bytes of prompts that decode's prefix cache held and that did not travel.",
        lambda load: load.delta_bytes_saved,
    ),
}
# Of worker.proto's TransportLoad.
_TRANSPORT_COUNTERS: dict[str, tuple[str, Callable[[worker_pb2.TransportLoad], float]]] = {
    "bytes": ("KV bytes sent or received over a transport.", lambda load: load.bytes),
    "transfers": (
        "KV transfers over a transport that came to an end, whichever (of servers that compute prompts).",
        lambda load: load.num_transfers,
    ),
    "seconds": (
        "Time from transfers' first page to their acknowledgement (prefill servers).",
        lambda load: load.seconds,
    ),
    "hidden_seconds": (
        "Part of it while the prompt was still computing.",
        lambda load: load.seconds - load.exposed_seconds,
    ),
    "exposed_seconds": (
        "Part of it after the prompt was computed, that the request waited for.",
        lambda load: load.exposed_seconds,
    ),
    "operations": ("Frames, messages or descriptors that the pages took.", lambda load: load.num_operations),
}


class PoolCollector(Collector):
    """One sample a connected worker; a worker that is away shows as `baton_worker_up` 0."""

    def __init__(self, pool: WorkerPool, admission: Admission) -> None:
        self._pool = pool
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        yield GaugeMetricFamily(
            "baton_queue_requests", "Requests in the router's queue.", value=self._admission.num_waiting
        )
        yield CounterMetricFamily(
            "baton_refused_requests",
            "Requests that got 503 because the queue was full, or no place came in time.",
            value=self._admission.num_refused,
        )
        up = GaugeMetricFamily("baton_worker_up", "Whether the worker is connected.", labels=_LABELS)
        for link, labels in self._labelled():
            up.add_metric(labels, float(link.worker is not None))
        yield up
        for name, (text, value) in _GAUGES.items():
            yield self._load(GaugeMetricFamily(f"baton_worker_{name}", text, labels=_LABELS), value)
        for name, (text, value) in _COUNTERS.items():
            yield self._load(CounterMetricFamily(f"baton_worker_{name}", text, labels=_LABELS), value)
        yield self._transfers()
        for name, (text, of_transport) in _TRANSPORT_COUNTERS.items():
            yield self._transports(name, text, of_transport)

    def _labelled(self) -> Iterator[tuple[WorkerLink, tuple[str, str]]]:
        """Each worker's role and name; two of one name, which Prometheus refuses, with their addresses."""
        links = self._pool.links
        counts = Counter((link.role_name, link.name) for link in links)
        for link in links:
            is_alone = counts[link.role_name, link.name] == 1
            yield link, (link.role_name, link.name if is_alone else f"{link.name}@{link.address}")

    def _loads(self) -> Iterator[tuple[tuple[str, str], worker_pb2.Load]]:
        """The labels and the load of each connected worker."""
        for link, labels in self._labelled():
            if link.worker is not None:
                yield labels, link.worker.load

    def _load(
        self, family: GaugeMetricFamily | CounterMetricFamily, value: Callable[[worker_pb2.Load], float]
    ) -> Metric:
        for labels, load in self._loads():
            family.add_metric(labels, value(load))
        return family

    def _transfers(self) -> Metric:
        family = CounterMetricFamily(
            "baton_worker_transfers", "KV transfers by outcome.", labels=(*_LABELS, "outcome")
        )
        for labels, load in self._loads():
            for outcome, count in sorted(load.transfers.items()):
                family.add_metric((*labels, outcome), count)
        return family

    def _transports(self, name: str, text: str, value: Callable[[worker_pb2.TransportLoad], float]) -> Metric:
        family = CounterMetricFamily(f"baton_worker_transport_{name}", text, labels=(*_LABELS, "transport"))
        for labels, load in self._loads():
            for transport in load.transports:
                family.add_metric((*labels, transport.name), value(transport))
        return family
