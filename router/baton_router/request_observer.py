"""What one request adds to the router's metrics."""

import time
from types import TracebackType
from typing import Self

from baton_router.backend import GenerationRequest
from baton_router.metrics import ABORTED, FrontMetrics
from baton_router.text_delta import TextDelta


class RequestObserver:
    """Counts and times a request while it is entered; tell it of every delta."""

    def __init__(self, metrics: FrontMetrics, request: GenerationRequest) -> None:
        self._metrics = metrics
        self._request = request
        self._is_first = True
        self._choices = [_Choice() for _ in range(request.sampling.n)]

    def __enter__(self) -> Self:
        self._metrics.num_running += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.num_running -= 1
        num_open = sum(not choice.is_finished for choice in self._choices)
        if num_open:
            self._metrics.requests.finished_choices.labels(finished_reason=ABORTED).inc(num_open)
        else:
            self._note_request()

    def observe(self, delta: TextDelta) -> None:
        """Count one delta."""
        metrics, choice, now = self._metrics, self._choices[delta.choice], time.monotonic()
        if self._is_first:
            self._is_first = False
            metrics.time_to_first_token.observe(now - self._request.arrived_s)
            metrics.prompt_tokens.inc(len(self._request.token_ids))
        if delta.num_cached_prompt_tokens:
            metrics.cached_prompt_tokens.inc(delta.num_cached_prompt_tokens)
        num_new = len(delta.tokens)
        metrics.generation_tokens.inc(num_new)
        if choice.last_s is None:
            choice.first_s, choice.num_first_tokens = now, num_new
        elif num_new:
            metrics.inter_token_latency.observe((now - choice.last_s) / num_new)
        choice.last_s = now
        choice.num_tokens += num_new
        if delta.finish_reason is not None:
            choice.is_finished = True
            metrics.requests.finished_choices.labels(finished_reason=delta.finish_reason.value).inc()
            metrics.requests.generation_tokens.observe(choice.num_tokens)
            if (num_later := choice.num_tokens - choice.num_first_tokens) > 0:
                metrics.requests.time_per_output_token.observe((now - choice.first_s) / num_later)

    def _note_request(self) -> None:
        metrics, sampling = self._metrics, self._request.sampling
        metrics.request_duration.observe(time.monotonic() - self._request.arrived_s)
        metrics.requests.prompt_tokens.observe(len(self._request.token_ids))
        metrics.requests.longest_answer.observe(max(choice.num_tokens for choice in self._choices))
        metrics.requests.max_tokens.observe(sampling.max_tokens)
        metrics.requests.n.observe(sampling.n)


class _Choice:
    """What has come of one choice."""

    __slots__ = ("first_s", "is_finished", "last_s", "num_first_tokens", "num_tokens")

    def __init__(self) -> None:
        self.first_s = 0.0
        self.last_s: float | None = None  # None: nothing has come
        self.num_first_tokens = 0
        self.num_tokens = 0
        self.is_finished = False
