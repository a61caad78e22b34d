"""The workers in the router's /metrics, read when Prometheus asks."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.v1 import worker_pb2
from baton_router.requests.admission import Admission
from baton_router.workers.pool import WorkerPool
from baton_router.workers.worker_link import WorkerLink

_LABELS = ("role", "worker")
# Fields of worker.proto's Load, and what they are.
_GAUGES = {
    "num_running": "Sequences in the worker's batch.",
    "num_waiting": "Requests that wait on the worker.",
    "num_reserved": "Requests whose pages wait for their KV.",
    "num_blocks": "KV pages of the worker.",
    "num_free_blocks": "KV pages that no request holds, cached ones included.",
}
_COUNTERS = {
    "num_preemptions": "Sequences that lost their pages and computed them again.",
    "prefix_queries": "KV pages looked up in the prefix cache.",
    "prefix_hits": "KV pages found in the prefix cache.",
    "transfer_bytes": "KV bytes sent or received.",
    "delta_bytes_saved": "KV bytes of prompts that decode's prefix cache held and that did not travel.",
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
        up = GaugeMetricFamily("baton_worker_up", "Whether the worker is connected.", labels=_LABELS)
        for link in self._pool.links:
            up.add_metric((link.role_name, link.address), float(link.worker is not None))
        yield up
        for name, text in _GAUGES.items():
            yield self._family(GaugeMetricFamily(f"baton_worker_{name}", text, labels=_LABELS), name)
        for name, text in _COUNTERS.items():
            yield self._family(CounterMetricFamily(f"baton_worker_{name}", text, labels=_LABELS), name)
        yield self._transfers()
        for name, (text, value) in _TRANSPORT_COUNTERS.items():
            yield self._transports(name, text, value)

    def _family(
        self, family: GaugeMetricFamily | CounterMetricFamily, field: str
    ) -> GaugeMetricFamily | CounterMetricFamily:
        for link in self._pool.links:
            if link.worker is not None:
                family.add_metric(_labels(link), float(getattr(link.worker.load, field)))
        return family

    def _transfers(self) -> Metric:
        family = CounterMetricFamily(
            "baton_worker_transfers", "KV transfers by outcome.", labels=(*_LABELS, "outcome")
        )
        for link in self._pool.links:
            if link.worker is not None:
                for outcome, count in sorted(link.worker.load.transfers.items()):
                    family.add_metric((*_labels(link), outcome), float(count))
        return family

    def _transports(self, name: str, text: str, value: Callable[[worker_pb2.TransportLoad], float]) -> Metric:
        family = CounterMetricFamily(f"baton_worker_transport_{name}", text, labels=(*_LABELS, "transport"))
        for link in self._pool.links:
            if link.worker is not None:
                for transport in link.worker.load.transports:
                    family.add_metric((*_labels(link), transport.name), value(transport))
        return family


def _labels(link: WorkerLink) -> tuple[str, str]:
    return (link.role_name, link.address)
