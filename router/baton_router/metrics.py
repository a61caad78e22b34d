"""What the router counts and times of requests, for Prometheus. Labels come from fixed sets only."""

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from baton.core.stopping import FinishReason

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LENGTH_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_CHOICE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 128)

ABORTED = "abort"  # vLLM's word for what did not end by itself


class RequestMetrics:
    """How long requests and their parts are: in tokens, and in seconds of each stage."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.queue_time = self._seconds(
            "queue", "From a request's arrival at the router's back to its place on workers."
        )
        self.inference_time = self._seconds("inference", "From its place on workers to its last token.")
        self.prefill_time = self._seconds("prefill", "From its place on workers to its first token.")
        self.decode_time = self._seconds("decode", "From its first token to its last.")
        self.time_per_output_token = Histogram(
            "baton_request_time_per_output_token_seconds",
            "From a choice's first tokens to its last, divided by the tokens between; finished choices only.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = self._tokens("prompt_tokens", "Tokens of a request's prompt.")
        self.generation_tokens = self._tokens("generation_tokens", "Tokens of a finished choice.")
        self.longest_answer = self._tokens(
            "longest_answer_tokens", "Tokens of a finished request's longest choice."
        )
        self.max_tokens = self._tokens("max_tokens", "A finished request's max_tokens.")
        self.n = Histogram(
            "baton_request_n", "A finished request's choices.", buckets=_CHOICE_BUCKETS, registry=registry
        )
        self.finished_choices = Counter(
            "baton_finished_choices",
            "Choices by why they ended; abort: the client went away, or the request failed.",
            ["finished_reason"],
            registry=registry,
        )
        for reason in (*(reason.value for reason in FinishReason), ABORTED):
            self.finished_choices.labels(finished_reason=reason)  # shows as 0 before the first one

    def _seconds(self, what: str, text: str) -> Histogram:
        name = f"baton_request_{what}_seconds"
        return Histogram(name, text, buckets=_REQUEST_BUCKETS, registry=self._registry)

    def _tokens(self, what: str, text: str) -> Histogram:
        return Histogram(f"baton_request_{what}", text, buckets=_LENGTH_BUCKETS, registry=self._registry)


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
        self.requests = RequestMetrics(registry)
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
