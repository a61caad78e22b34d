"""One request on its way: its workers' tokens in one order, over as many attempts as it takes."""

import logging
import time
from collections.abc import AsyncGenerator

from baton.core.errors import BatonError, Overloaded, RequestFailed, TransferFailed, Unavailable, WorkerLost
from baton.core.request import EngineRequest, TokenEvent
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton.core.transfer_stats import TransferReport
from baton.v1 import transfer_pb2
from router.attempt import Assignment, Attempt
from router.generation import GenerationRequest, TokenDelta
from router.metrics import FrontMetrics
from router.pool import WorkerPool
from router.prompt_hashes import PromptHashes
from router.timeline import Timeline
from router.worker_link import WorkerLink

logger = logging.getLogger(__name__)

# No step of any model takes this long; a prompt's last chunk comes sooner.
SILENCE_TIMEOUT_S = 600.0
MAX_ATTEMPTS = 3
MAX_LOSSES = 1  # a request that ends the process that computes it is not to end them all


class _Choice:
    """Tokens of one choice, brought into order: decode's second may overtake prefill's first."""

    def __init__(self) -> None:
        self.is_open = True  # the front door wants more of it
        self.has_finished = False  # a worker has ended it
        self._next_position = 0
        self._early: dict[int, TokenEvent] = {}

    def add(self, event: TokenEvent) -> None:
        """Take a token in, in whatever order; one that has been passed on already stands as it was."""
        if event.position >= self._next_position:
            self._early[event.position] = event

    def take_ready(self) -> list[TokenEvent]:
        """The tokens that are next in order."""
        ready: list[TokenEvent] = []
        while (event := self._early.pop(self._next_position, None)) is not None:
            ready.append(event)
            self._next_position += 1
        return ready


class Flight:
    """One request, from its placement to its last token.

    Prefill's first tokens go to the client before the pages have arrived. Where these then do not arrive, or
    a worker is lost, the request is placed anew and prefill computes it again, from its prefix cache where it
    can; the tokens that the client has got stand. After MAX_ATTEMPTS, or more than MAX_LOSSES, or once decode
    has begun, the client gets the error.
    """

    def __init__(
        self, request: GenerationRequest, pool: WorkerPool, fingerprint: bytes, metrics: FrontMetrics
    ) -> None:
        self._request = request
        self._pool = pool
        self._metrics = metrics
        self._hashes = PromptHashes(fingerprint, request.cache_salt, request.token_ids)
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._first_tokens: dict[int, int] = {}  # by choice; the first that was said stands
        self._num_attempts = 0
        self._num_losses = 0
        self._attempt: Attempt | None = None
        self._timeline = Timeline(time.monotonic())

    async def run(self) -> AsyncGenerator[TokenDelta]:
        """Stream the tokens; closing it aborts the request on its workers."""
        try:
            attempt = await self._begin_attempt()
            while self._is_open:
                await self._take_all(attempt)
                for delta in self._deltas():
                    yield delta
                if (error := attempt.error) is not None and self._is_open:  # what has finished stays finished
                    attempt = await self._try_again(attempt, error)
        finally:
            if self._attempt is not None:
                self._attempt.leave(has_finished=all(choice.has_finished for choice in self._choices))
            self._stamp("ended")
            logger.info("request %s: %s", self._request.request_id, self._timeline.text())

    def abort_choice(self, choice: int) -> None:
        """Nobody wants more of this choice; without the last one the whole request is left."""
        self._choices[choice].is_open = False
        if self._attempt is not None:
            if self._is_open:
                self._attempt.abort_choice(choice)
            self._attempt.inbox.wake()

    @property
    def _is_open(self) -> bool:
        return any(choice.is_open for choice in self._choices)

    # --- attempts -----------------------------------------------------------------------------------

    async def _begin_attempt(self) -> Attempt:
        """Place the request and begin it there. Raises Unavailable or WorkerLost."""
        self._num_attempts += 1
        self._timeline.num_attempts = self._num_attempts
        prefill, decode = self._pool.place()
        assignments = await self._assignment(prefill), await self._assignment(decode)
        self._attempt = Attempt(*assignments)
        closed_choices = [index for index, choice in enumerate(self._choices) if not choice.is_open]
        self._attempt.start(self._first_tokens, closed_choices)
        return self._attempt

    async def _assignment(self, link: WorkerLink) -> Assignment:
        request, number = self._request, self._num_attempts
        engine_request = EngineRequest(
            # Each attempt has an id of its own: a worker may still be letting go of the last one's pages, or
            # be in a step that computes it, and tells its requests apart by nothing else.
            request_id=request.request_id if number == 1 else f"{request.request_id}/{number}",
            prompt_token_ids=request.token_ids,
            hash_seed=self._hashes.seed,
            block_hashes=await self._hashes.of(link.require_worker().layout.block_size),
            sampling=request.sampling,
            priority=request.priority,
        )
        return Assignment(link, engine_request)

    async def _try_again(self, attempt: Attempt, error: BatonError) -> Attempt:
        """Take a failed attempt off its workers, and begin another.

        Raises the first one's error where another would not help, and Unavailable where none can be placed.
        """
        reason = self._retry_reason(attempt, error)
        if reason is None or self._num_attempts == MAX_ATTEMPTS:
            raise error
        attempt.leave(has_finished=False)
        self._metrics.retries.labels(reason=reason).inc()
        logger.info(
            "request %s: attempt %d of %d failed, trying again: %s",
            self._request.request_id,
            self._num_attempts,
            MAX_ATTEMPTS,
            error,
        )
        try:
            return await self._begin_attempt()
        except Unavailable as nowhere:  # after a loss that is no news
            raise (error if isinstance(error, WorkerLost) else nowhere) from None

    def _retry_reason(self, attempt: Attempt, error: BatonError) -> str | None:
        """Why another attempt may do better, as metrics name it; None where it would not."""
        if attempt.decode_has_begun:
            return None
        if isinstance(error, TransferFailed):
            return "transfer"
        if isinstance(error, WorkerLost):
            self._num_losses += 1
            return "lost" if self._num_losses <= MAX_LOSSES else None
        # A worker that was told to stop takes nothing new, though the request was placed there before.
        return "draining" if isinstance(error, Overloaded) and attempt.is_on_draining_worker else None

    # --- what the workers say -----------------------------------------------------------------------

    async def _take_all(self, attempt: Attempt) -> None:
        for item in await attempt.inbox.take_all(SILENCE_TIMEOUT_S):
            match item:
                case TokenEvent():
                    self._take_token(attempt, item)
                case transfer_pb2.Ticket() if self._is_open:
                    self._stamp("pages reserved")
                    attempt.prefill(item, self._first_tokens)
                case TransferReport():
                    self._timeline.transfer = item
                case BatonError():
                    attempt.fail(item)

    def _take_token(self, attempt: Attempt, event: TokenEvent) -> None:
        if event.choice >= len(self._choices):
            raise RequestFailed(f"A worker sent a token of choice {event.choice}, which was not asked for.")
        self._choices[event.choice].add(event)
        if event.position == 0:
            self._stamp("first token")
            self._first_tokens.setdefault(event.choice, event.token.token_id)
        else:
            self._stamp("next token")
            attempt.decode_has_begun = True
        # A choice that nobody wants any more has no first token where one worker does it all.
        if attempt.decode_has_begun and (attempt.is_local or len(self._first_tokens) == len(self._choices)):
            attempt.hand_over()

    def _stamp(self, what: str) -> None:
        self._timeline.stamp(what, time.monotonic())

    def _deltas(self) -> list[TokenDelta]:
        deltas = []
        for index, choice in enumerate(self._choices):
            if choice.is_open and (events := choice.take_ready()):
                delta = _delta(index, events)
                choice.has_finished = delta.finish_reason is not None
                choice.is_open = not choice.has_finished
                deltas.append(delta)
        return deltas


def _delta(choice: int, events: list[TokenEvent]) -> TokenDelta:
    tokens: tuple[SampledToken, ...] = tuple(event.token for event in events)
    reason: FinishReason | None = events[-1].finish_reason
    return TokenDelta(choice, tokens, reason, events[0].num_cached_prompt_tokens)
