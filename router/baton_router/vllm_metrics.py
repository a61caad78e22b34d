"""Baton's metrics once more under vLLM's names and labels, so that dashboards made for vLLM show them.

Nothing is counted twice: what Baton counts is renamed when Prometheus asks.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from baton.v1 import worker_pb2
from baton_router.metrics import FrontMetrics
from baton_router.requests.admission import Admission
from baton_router.workers.pool import WorkerPool
from baton_router.workers.worker_link import WorkerLink

_ENGINE = "0"  # vLLM's label for one of several engines behind a server


class VllmNames(Collector):
    """What a router shows as one vLLM server, whichever workers it has."""

    def __init__(self, model: str, metrics: FrontMetrics, pool: WorkerPool, admission: Admission) -> None:
        self._labels = {"model_name": model, "engine": _ENGINE}
        self._pool = pool
        self._admission = admission
        self._metrics = metrics
        self._renamed: Mapping[str, Counter | Histogram] = {
            "prompt_tokens": metrics.prompt_tokens,
            "generation_tokens": metrics.generation_tokens,
            "time_to_first_token_seconds": metrics.time_to_first_token,
            "inter_token_latency_seconds": metrics.inter_token_latency,
            "request_time_per_output_token_seconds": metrics.requests.time_per_output_token,
            "e2e_request_latency_seconds": metrics.request_duration,
            "request_queue_time_seconds": metrics.requests.queue_time,
            "request_inference_time_seconds": metrics.requests.inference_time,
            "request_prefill_time_seconds": metrics.requests.prefill_time,
            "request_decode_time_seconds": metrics.requests.decode_time,
            "request_prompt_tokens": metrics.requests.prompt_tokens,
            "request_generation_tokens": metrics.requests.generation_tokens,
            "request_max_num_generation_tokens": metrics.requests.longest_answer,
            "request_params_n": metrics.requests.n,
            "request_params_max_tokens": metrics.requests.max_tokens,
            "request_success": metrics.requests.finished_choices,
        }

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        for name, source in self._renamed.items():
            for metric in source.collect():
                yield self._under(f"vllm:{name}", metric)
        num_waiting = self._admission.num_waiting
        yield self._gauge(
            "num_requests_running", "Requests that workers have.", self._num_running(num_waiting)
        )
        yield self._gauge("num_requests_waiting", "Requests in the router's queue.", num_waiting)
        used = _share_used(self._pool.decodes)
        yield self._gauge("kv_cache_usage_perc", "Of decode servers' KV pages, the share that is held.", used)
        loads = [link.worker.load for link in self._pool.links if link.worker is not None]
        of_prompts = [link.worker.load for link in self._pool.prefills if link.worker is not None]
        yield self._counter("num_preemptions", "Preemptions of all workers.", _sum(loads, "num_preemptions"))
        for name, what in (("queries", "looked up in"), ("hits", "found in")):
            total = _sum(of_prompts, f"prefix_cache_{name}")
            yield self._counter(
                f"prefix_cache_{name}", f"Prompt tokens {what} prefill's prefix caches.", total
            )

    def _num_running(self, num_waiting: int) -> int:
        return max(0, self._metrics.num_running - num_waiting)

    def _under(self, name: str, metric: Metric) -> Metric:
        renamed = Metric(name, metric.documentation, metric.type)
        renamed.samples = [
            Sample(sample.name.replace(metric.name, name, 1), {**self._labels, **sample.labels}, sample.value)
            for sample in metric.samples
            if not sample.name.endswith("_created")
        ]
        return renamed

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family


def _share_used(links: list[WorkerLink]) -> float:
    loads = [link.worker.load for link in links if link.worker is not None]
    num_blocks = sum(load.num_blocks for load in loads)
    return 1.0 - sum(load.num_free_blocks for load in loads) / num_blocks if num_blocks else 0.0


def _sum(loads: list[worker_pb2.Load], field: str) -> float:
    return float(sum(getattr(load, field) for load in loads))
