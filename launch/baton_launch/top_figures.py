"""What `baton top` shows, from two readings of a router's /metrics. Pure: no clock, no I/O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """All samples of a /metrics, and when it was read, in seconds."""

    at_s: float
    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def of(cls, text: str, at_s: float) -> "Reading":
        """Raises ValueError where the text is none of Prometheus's."""
        samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return cls(at_s, samples)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 where there is none."""
        wanted = set(labels.items())
        return sum(value for found, value in self.samples.get(name, {}).items() if wanted <= set(found))


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker, now."""

    role: str
    name: str
    is_connected: bool
    num_running: int
    num_waiting: int
    share_held: float  # of its KV pages
    kv_bytes_s: float  # sent or received


@dataclass(frozen=True, slots=True)
class Figures:
    """A router and its workers, over the time between two readings."""

    prompt_tokens_s: float
    generated_tokens_s: float
    requests_s: float  # finished choices
    failures_s: float  # HTTP 5xx and choices that were aborted
    num_running: int
    num_waiting: int
    first_token_s: Sequence[float | None]  # 50, 95 and 99 of 100; None: nothing came
    between_tokens_s: Sequence[float | None]
    workers: Sequence[WorkerFigures] = field(default_factory=tuple)


SHARES = (0.5, 0.95, 0.99)


def figures(before: Reading, now: Reading) -> Figures:
    """What has happened between them."""
    seconds = max(now.at_s - before.at_s, 1e-9)

    def rate(name: str, **labels: str) -> float:
        # A router that was started anew counts from 0.
        return max(0.0, now.total(name, **labels) - before.total(name, **labels)) / seconds

    failed = sum(
        rate("baton_http_requests_total", status=status)
        for status in {dict(labels)["status"] for labels in now.samples.get("baton_http_requests_total", {})}
        if status.startswith("5")
    )
    return Figures(
        prompt_tokens_s=rate("baton_prompt_tokens_total"),
        generated_tokens_s=rate("baton_generation_tokens_total"),
        requests_s=rate("baton_finished_choices_total"),
        failures_s=failed + rate("baton_finished_choices_total", finished_reason="abort"),
        num_running=int(now.total("vllm:num_requests_running")),
        num_waiting=int(now.total("vllm:num_requests_waiting")),
        first_token_s=_quantiles(before, now, "baton_time_to_first_token_seconds"),
        between_tokens_s=_quantiles(before, now, "baton_inter_token_latency_seconds"),
        workers=[_worker(labels, now, rate) for labels in sorted(now.samples.get("baton_worker_up", {}))],
    )


def _worker(labels: Labels, now: Reading, rate: Callable[..., float]) -> WorkerFigures:
    own = dict(labels)
    num_blocks = now.total("baton_worker_num_blocks", **own)
    num_free = now.total("baton_worker_num_free_blocks", **own)
    return WorkerFigures(
        role=own["role"],
        name=own["worker"],
        is_connected=now.total("baton_worker_up", **own) > 0,
        num_running=int(now.total("baton_worker_num_running", **own)),
        num_waiting=int(now.total("baton_worker_num_waiting", **own)),
        share_held=1 - num_free / num_blocks if num_blocks else 0.0,
        kv_bytes_s=rate("baton_worker_transfer_bytes_total", **own),
    )


def _quantiles(before: Reading, now: Reading, name: str) -> list[float | None]:
    """Of a histogram's observations between the readings, interpolated as Prometheus does."""
    counts: dict[float, float] = {}
    for labels, value in now.samples.get(f"{name}_bucket", {}).items():
        bound = float(dict(labels)["le"])
        counts[bound] = counts.get(bound, 0.0) + value - before.total(f"{name}_bucket", **dict(labels))
    bounds = sorted(counts)
    total = counts[bounds[-1]] if bounds else 0.0
    return [_quantile(bounds, counts, share * total) if total > 0 else None for share in SHARES]


def _quantile(bounds: Sequence[float], counts: Mapping[float, float], rank: float) -> float:
    low, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            if bound == float("inf"):
                return low
            inside = counts[bound] - below
            return low + (bound - low) * ((rank - below) / inside if inside else 1.0)
        low, below = bound, counts[bound]
    return low
