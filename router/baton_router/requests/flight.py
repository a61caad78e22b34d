"""One request on its way: its workers' tokens in one order, over as many attempts as it takes."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace

from baton.core.errors import BatonError, Overloaded, RequestFailed, TransferFailed, Unavailable, WorkerLost
from baton.core.features import needed_features
from baton.core.request import EngineRequest, PromptLogprobs, TokenEvent
from baton.core.sampling import SampledToken, choice_seed
from baton.core.stopping import FinishReason
from baton.core.transfer_stats import TransferReport
from baton.v1 import transfer_pb2
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.metrics import FrontMetrics
from baton_router.requests.attempt import Assignment, Attempt
from baton_router.requests.prompt_hashes import PromptHashes
from baton_router.requests.prompt_tokens import PromptTokens
from baton_router.requests.timeline import Timeline
from baton_router.workers.inbox import Inbox
from baton_router.workers.pool import WorkerPool
from baton_router.workers.worker_link import WorkerLink

logger = logging.getLogger(__name__)

# No step of any model takes this long; a prompt's last chunk comes sooner.
SILENCE_TIMEOUT_S = 600.0
MAX_ATTEMPTS = 3
# In a row, without a token of decode's between: a request that ends the process that computes it is not to
# end them all, but a long answer may see one server after another go. MAX_ATTEMPTS bounds those too.
MAX_LOSSES = 1


class _Choice:
    """Tokens of one choice, brought into order: decode's second may overtake prefill's first."""

    def __init__(self) -> None:
        self.is_open = True  # the front door wants more of it
        self.has_finished = False  # a worker has ended it
        self.answered_token_ids: list[int] = []  # passed on: they stand
        self._early: dict[int, TokenEvent] = {}

    def add(self, event: TokenEvent) -> None:
        """Take a token in, in whatever order; one that has been passed on already stands as it was."""
        if event.position >= len(self.answered_token_ids):
            self._early[event.position] = event

    def take_ready(self) -> list[TokenEvent]:
        """The tokens that are next in order."""
        ready: list[TokenEvent] = []
        while (event := self._early.pop(len(self.answered_token_ids), None)) is not None:
            ready.append(event)
            self.answered_token_ids.append(event.token.token_id)
        return ready

    def forget_early(self) -> None:
        """Another attempt goes on from what was passed on; these need not be what comes after that."""
        self._early.clear()


class Flight:
    """One request, from its placement to its last token.

    Prefill's first tokens go to the client before the pages have arrived. Where these then do not arrive, or
    a worker is lost, in mid-answer too, the choices that have not ended are placed anew. The tokens that the
    client has got stand: prefill computes them with the prompt, from its prefix cache where it can, and the
    answer goes on after them. After MAX_ATTEMPTS, or more than MAX_LOSSES, the client gets the error.
    """

    def __init__(self, request: GenerationRequest, pool: WorkerPool, metrics: FrontMetrics) -> None:
        self._request = request
        self._pool = pool
        self._metrics = metrics
        self._hashes = PromptHashes(pool.model.fingerprint, request.cache_salt, request.token_ids)
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._attempts: list[Attempt] = []  # under way; each open choice is in one of them
        self._prompt = PromptTokens(request)
        self._num_begun = 0
        self._news = asyncio.Event()  # something has come for an attempt, or nobody wants a choice any more
        self._timeline = Timeline(time.monotonic())
        self._end: BatonError | None = None  # what ends it, whatever becomes of its attempts

    async def run(self) -> AsyncGenerator[TokenDelta]:
        """Stream the tokens; closing it aborts the request on its workers."""
        everything = tuple(range(len(self._choices)))
        request = self._request
        logger.debug(
            "request %s begins: %d prompt tokens, at most %d answered in each of %d choices",
            request.request_id, len(request.token_ids), request.sampling.max_tokens, request.sampling.n,
        )  # fmt: skip
        try:
            await self._begin([everything], attempt_number=1, num_losses_before=0)
            while self._are_open(everything):
                await self._wait_for_news()
                if self._end is not None:
                    raise self._end
                for attempt in self._attempts:
                    self._take_all(attempt)
                for delta in self._deltas():
                    yield delta
                for attempt in tuple(self._attempts):  # what has finished stays finished
                    if not self._are_open(attempt.choices):
                        self._leave(attempt)
                await self._replace([attempt for attempt in self._attempts if attempt.error is not None])
        except Exception as error:
            logger.warning("request %s failed: %s", request.request_id, error)
            raise
        finally:
            for attempt in tuple(self._attempts):
                self._leave(attempt)
            self._stamp("ended")
            num_tokens = sum(len(choice.answered_token_ids) for choice in self._choices)
            logger.debug(
                "request %s: %d prompt tokens, %d answered, %s",
                request.request_id, len(request.token_ids), num_tokens, self._timeline.text(),
            )  # fmt: skip

    def end(self, error: BatonError) -> None:
        """Give the request up: `run` raises the error."""
        self._end = error
        self._news.set()

    def abort_choice(self, choice: int) -> None:
        """Nobody wants more of this choice; an attempt that has no other one is left."""
        self._choices[choice].is_open = False
        for attempt in self._attempts:
            if choice in attempt.choices and self._are_open(attempt.choices):
                attempt.abort_choice(choice)
        self._news.set()

    def _are_open(self, choices: Iterable[int]) -> bool:
        """Whether at least one of them is."""
        return any(self._choices[choice].is_open for choice in choices)

    # --- attempts -----------------------------------------------------------------------------------

    async def _begin(
        self, parts: list[tuple[int, ...]], *, attempt_number: int, num_losses_before: int
    ) -> None:
        """Place choices, and begin one attempt for those of each part. Raises Unavailable or WorkerLost.

        They stay together: if the request ends the process that computes it, it is to end only one.
        """
        self._timeline.num_attempts = max(self._timeline.num_attempts, attempt_number)
        is_answered = any(choice.answered_token_ids for choice in self._choices)
        links = self._pool.place(needed_features(self._request.sampling, is_answered=is_answered))
        if self._pool.model.fingerprint != self._hashes.fingerprint:
            raise Unavailable("The workers serve another model than when this request came. Try again.")
        for choices in parts:
            self._num_begun += 1
            prefill, decode = [await self._assignment(link, choices) for link in links]
            inbox = Inbox(self._news)
            attempt = Attempt(choices, prefill, decode, inbox, attempt_number, num_losses_before)
            self._attempts.append(attempt)
            attempt.start()
            self._metrics.recomputed_tokens.inc(len(prefill.request.answered_token_ids))

    async def _assignment(self, link: WorkerLink, choices: tuple[int, ...]) -> Assignment:
        request, number = self._request, self._num_begun
        sampling, answered = self._prompt.still_asked(request.sampling), tuple[int, ...]()
        if len(choices) == 1:
            sampling = replace(sampling, n=1, seed=choice_seed(sampling.seed, choices[0]))
            answered = tuple(self._choices[choices[0]].answered_token_ids)
        engine_request = EngineRequest(
            # Each attempt has an id of its own: a worker may still be letting go of the last one's pages, or
            # be in a step that computes it, and tells its requests apart by nothing else.
            request_id=request.request_id if number == 1 else f"{request.request_id}/{number}",
            prompt_token_ids=request.token_ids,
            hash_seed=self._hashes.seed,
            block_hashes=await self._hashes.of(link.require_worker().layout.block_size, answered),
            sampling=sampling,
            priority=request.priority,
            answered_token_ids=answered,
        )
        return Assignment(link, engine_request)

    def _leave(self, attempt: Attempt) -> None:
        attempt.leave(has_finished=all(self._choices[choice].has_finished for choice in attempt.choices))
        self._attempts.remove(attempt)

    async def _replace(self, failed: list[Attempt]) -> None:
        """Take failed attempts off their workers, and begin others.

        Raises an attempt's error where another would not help, and Unavailable where none can be placed.
        """
        if not failed:
            return
        reasons = [self._retry_reason(attempt) for attempt in failed]
        error, number = failed[0].error, max(attempt.number for attempt in failed)
        assert error is not None
        self._metrics.retries.labels(reason=reasons[0]).inc()
        logger.info(
            "request %s: attempt %d of %d failed, trying again: %s",
            self._request.request_id,
            number,
            MAX_ATTEMPTS,
            error,
        )
        parts: list[tuple[int, ...]] = []
        for attempt in failed:
            self._leave(attempt)
            for choice in attempt.choices:
                self._choices[choice].forget_early()
            parts += self._parts(attempt.choices)
        num_losses = max(attempt.num_losses for attempt in failed)
        try:
            await self._begin(parts, attempt_number=number + 1, num_losses_before=num_losses)
        except Unavailable as nowhere:  # after a loss that is no news
            raise (error if isinstance(error, WorkerLost) else nowhere) from None

    def _retry_reason(self, attempt: Attempt) -> str:
        """Why another attempt may do better, as metrics name it. Raises the attempt's error where not."""
        error = attempt.error
        assert error is not None
        if attempt.number < MAX_ATTEMPTS:
            if isinstance(error, TransferFailed):
                return "transfer"
            if isinstance(error, WorkerLost) and attempt.num_losses <= MAX_LOSSES:
                return "lost"
            # A worker that was told to stop takes nothing new, though the request was placed there before.
            if isinstance(error, Overloaded) and attempt.is_on_draining_worker:
                return "draining"
        raise error

    def _parts(self, choices: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The open ones of an attempt's choices: together, as they began, or one by one where they differ."""
        open_choices = tuple(index for index in choices if self._choices[index].is_open)
        if open_choices == choices and not any(self._choices[index].answered_token_ids for index in choices):
            return [choices]
        return [(index,) for index in open_choices]

    # --- what the workers say -----------------------------------------------------------------------

    async def _wait_for_news(self) -> None:
        try:
            async with asyncio.timeout(SILENCE_TIMEOUT_S):
                await self._news.wait()
        except TimeoutError:
            raise RequestFailed(
                f"The workers said nothing about this request for {SILENCE_TIMEOUT_S:.0f} s."
            ) from None
        self._news.clear()

    def _take_all(self, attempt: Attempt) -> None:
        for item in attempt.inbox.take_all():
            match item:
                case TokenEvent():
                    self._take_token(attempt, item)
                case PromptLogprobs():
                    self._prompt.add(item)
                case transfer_pb2.Ticket() if self._are_open(attempt.choices):
                    self._stamp("pages reserved")
                    attempt.prefill(item)
                case TransferReport():
                    self._timeline.transfer = item
                case BatonError():
                    attempt.fail(item)

    def _take_token(self, attempt: Attempt, event: TokenEvent) -> None:
        if event.choice >= len(attempt.choices):
            raise RequestFailed(f"A worker sent a token of choice {event.choice}, which was not asked for.")
        self._choices[attempt.choices[event.choice]].add(event)
        self._stamp("next token" if event.position else "first token")
        attempt.note_token(event.position)

    def _stamp(self, what: str) -> None:
        self._timeline.stamp(what, time.monotonic())

    def _deltas(self) -> list[TokenDelta]:
        deltas = []
        for index, choice in enumerate(self._choices):
            if choice.is_open and (events := choice.take_ready()):
                delta = replace(_delta(index, events), prompt_logprobs=self._prompt.take(index))
                choice.has_finished = delta.finish_reason is not None
                choice.is_open = not choice.has_finished
                deltas.append(delta)
        return deltas


def _delta(choice: int, events: list[TokenEvent]) -> TokenDelta:
    tokens: tuple[SampledToken, ...] = tuple(event.token for event in events)
    reason: FinishReason | None = events[-1].finish_reason
    return TokenDelta(choice, tokens, reason, events[0].num_cached_prompt_tokens)
