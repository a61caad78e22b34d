"""What the router counts and times of requests, for Prometheus. Labels come from fixed sets only."""

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class FrontMetrics:
    """The metrics of one router's requests, registered in the registry that /metrics shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """`registry` must not hold metrics of another FrontMetrics."""
        self.registry = registry
        self.num_running = 0  # requests, each with its prompt; those that wait for a place too
        self.http_requests = Counter(
            "baton_http_requests",
            "HTTP requests by route and status; 499: the client went away.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "baton_time_to_first_token_seconds",
            "From the parsed request to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "baton_inter_token_latency_seconds",
            "Time between the deltas of a choice, divided by the tokens of the later one.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.request_duration = Histogram(
            "baton_request_duration_seconds",
            "From the parsed request to the end of its last choice; finished requests only.",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "baton_prompt_tokens", "Prompt tokens of requests that got a first token.", registry=registry
        )
        self.cached_prompt_tokens = Counter(
            "baton_cached_prompt_tokens", "Prompt tokens found in a prefix cache.", registry=registry
        )
        self.generation_tokens = Counter(
            "baton_generation_tokens", "Tokens given to clients.", registry=registry
        )
        self.retries = Counter(
            "baton_retries",
            "Requests tried again because their KV transfer failed, or a worker was lost or about to stop; "
            "the client saw nothing of it.",
            ["reason"],
            registry=registry,
        )
        self.recomputed_tokens = Counter(
            "baton_recomputed_tokens",
            "Tokens that clients had got when their request was tried again: computed anew, to go on from.",
            registry=registry,
        )
        for reason in ("transfer", "lost", "draining"):
            self.retries.labels(reason=reason)  # shows as 0 before the first one

    def exposition(self) -> tuple[bytes, str]:
        """The text of /metrics and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
