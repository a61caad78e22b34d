"""The workers as the front doors see them: requests queue, are let in, and fly."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.core.errors import BatonError
from baton.core.features import needed_features
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.metrics import FrontMetrics
from baton_router.requests.admission import Admission
from baton_router.requests.flight import Flight
from baton_router.workers.pool import WorkerPool


class _Stages:
    """Times a request's way: it waits for a place, its prompt is computed, tokens follow."""

    def __init__(self, metrics: FrontMetrics, arrived_s: float) -> None:
        """It has its place now."""
        self._metrics = metrics
        self._placed_s = time.monotonic()
        self._first_s: float | None = None
        metrics.requests.queue_time.observe(self._placed_s - arrived_s)

    def note_tokens(self) -> None:
        """Some have come."""
        if self._first_s is None:
            self._first_s = time.monotonic()
            self._metrics.requests.prefill_time.observe(self._first_s - self._placed_s)

    def note_end(self) -> None:
        """No more will."""
        if self._first_s is not None:
            now = time.monotonic()
            self._metrics.requests.decode_time.observe(now - self._first_s)
            self._metrics.requests.inference_time.observe(now - self._placed_s)


class WorkerBackend:
    """The workers behind the front doors; see baton_router.backend.Backend."""

    def __init__(
        self,
        pool: WorkerPool,
        admission: Admission,
        max_model_len: int,
        metrics: FrontMetrics,
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._max_model_len = max_model_len
        self._metrics = metrics
        self._flights: dict[str, Flight] = {}

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request that every worker takes; the model's own length while there are none."""
        return min(self._max_model_len, self._pool.max_model_len or self._max_model_len)

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now has workers to run on."""
        return self._pool.is_ready

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
        """See baton_router.backend.Backend."""
        self._pool.place(needed_features(request.sampling, is_answered=False))  # else it need not wait
        num_slots, arrived_s = request.sampling.n, time.monotonic()
        await self._admission.enter(num_slots, request.priority, len(request.token_ids))
        stages = _Stages(self._metrics, arrived_s)
        try:
            flight = Flight(request, self._pool, self._metrics)
            self._flights[request.request_id] = flight
            async with aclosing(flight.run()) as deltas:
                async for delta in deltas:
                    stages.note_tokens()
                    yield delta
        finally:
            stages.note_end()
            self._flights.pop(request.request_id, None)
            self._admission.leave(num_slots)

    def end_all(self, error: BatonError) -> None:
        """See baton_router.backend.Backend."""
        self._admission.close(error)
        for flight in self._flights.values():
            flight.end(error)

    def reset_prefix_cache(self) -> None:
        """See baton_router.backend.Backend."""
        self._pool.reset_prefix_caches()

    def abort_choice(self, request_id: str, choice: int) -> None:
        """See baton_router.backend.Backend."""
        flight = self._flights.get(request_id)
        if flight is not None:
            flight.abort_choice(choice)
