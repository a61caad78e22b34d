"""Tokens to text, for both front doors: detokenises, ends it at stop strings and repetitions, and counts,
per choice."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.core.errors import RequestFailed
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.beam_search import search_beams
from baton_router.best_of import best_candidates, of_all_candidates
from baton_router.request_observer import RequestObserver
from baton_router.served_model import ServedModel
from baton_router.text.repetition import RepetitionDetector
from baton_router.text.stop_strings import StopMatcher
from baton_router.text_delta import TextDelta, joined

REPETITION_DETECTED = "repetition_detected"  # vLLM's stop_reason


class _ChoiceText:
    """The text of one choice so far.

    Special tokens that are no part of it count for stop strings that name them. A stop string may begin, but
    not end, within the first `min_tokens`; neither does a repetition end there.
    """

    def __init__(self, served: ServedModel, request: GenerationRequest) -> None:
        options = request.text
        self._request = request
        self._options = options
        self._detokenizer = served.tokenizer.detokenizer(
            skip_special_tokens=options.skip_special_tokens,
            spaces_between_special_tokens=options.spaces_between_special_tokens,
            after=request.token_ids,
        )
        self._special_text = served.tokenizer.special_text
        self._matcher = StopMatcher(options.stop_strings)
        self._detector = (
            RepetitionDetector(options.repetition) if options.repetition.max_pattern_size else None
        )
        self._num_tokens = 0
        self.is_finished = False

    def push(self, delta: TokenDelta) -> TextDelta:
        """The text of the choice's next tokens; tokens after the one that ended it are dropped."""
        pieces = []
        for index, token in enumerate(delta.tokens):
            self._num_tokens += 1
            is_last = delta.finish_reason is not None and index == len(delta.tokens) - 1
            if is_last and self._is_unseen_end(delta, token.token_id):
                pieces.append(self._read_unseen(token.token_id))
                break
            pieces.append(self._text_of(token.token_id))
            repeats = self._repeats(token.token_id)
            if self._matcher.is_matched or (repeats and not is_last):
                reason = FinishReason.STOP if self._matcher.is_matched else FinishReason.REPETITION
                return self._ended(delta, pieces, delta.tokens[: index + 1], reason)
        if delta.finish_reason is not None:
            return self._ended(delta, pieces, delta.tokens, delta.finish_reason)
        return TextDelta(
            delta.choice,
            "".join(pieces),
            delta.tokens,
            num_cached_prompt_tokens=delta.num_cached_prompt_tokens,
            prompt_logprobs=delta.prompt_logprobs,
        )

    def _is_unseen_end(self, delta: TokenDelta, token_id: int) -> bool:
        """Whether the last token is one that ends answers, and so no part of the text."""
        ends = delta.finish_reason is FinishReason.STOP and token_id in self._request.sampling.stop_token_ids
        return ends and not self._options.includes_stop

    def _text_of(self, token_id: int) -> str:
        text = self._matcher.push(self._detokenizer.push(token_id), may_match=self._may_match)
        return text + self._read_unseen(token_id) if self._options.skip_special_tokens else text

    def _read_unseen(self, token_id: int) -> str:
        """What a token that is no part of the text makes certain of it: a stop string may name the token."""
        special = self._special_text(token_id)
        if special is None or not self._options.stop_strings.names(special):
            return ""
        return self._matcher.push(special, may_match=self._may_match, is_hidden=True)

    def _repeats(self, token_id: int) -> bool:
        found = self._detector is not None and self._detector.push(token_id)
        return found and self._num_tokens >= self._request.sampling.min_tokens

    @property
    def _may_match(self) -> bool:
        return self._num_tokens > self._request.sampling.min_tokens

    def _rest(self) -> str:
        text = self._matcher.push(self._detokenizer.flush(), may_match=self._may_match)
        return text + self._matcher.flush()

    def _ended(
        self, delta: TokenDelta, pieces: list[str], tokens: tuple[SampledToken, ...], reason: FinishReason
    ) -> TextDelta:
        self.is_finished = True
        if not self._matcher.is_matched:
            pieces.append(self._rest())
        matched = self._matcher.matched
        if matched is not None:
            reason = FinishReason.STOP
            pieces += [matched] if self._options.includes_stop else []
        stop_reason = matched if matched is not None else self._other_stop_reason(tokens, reason)
        return TextDelta(
            delta.choice,
            "".join(pieces),
            tokens,
            reason,
            delta.num_cached_prompt_tokens,
            delta.prompt_logprobs,
            stop_reason,
        )

    def _other_stop_reason(self, tokens: tuple[SampledToken, ...], reason: FinishReason) -> str | int | None:
        if reason is FinishReason.REPETITION:
            return REPETITION_DETECTED
        if reason is not FinishReason.STOP or not tokens:
            return None
        last = tokens[-1].token_id
        request = self._request
        is_asked = last in request.sampling.stop_token_ids and last not in request.end_token_ids
        return last if is_asked else None


def generate_text(served: ServedModel, request: GenerationRequest) -> AsyncGenerator[TextDelta]:
    """Stream the text of every choice, interleaved; closing it aborts the request on the workers.

    Of choices that are picked among more, each comes as one delta. Raises what Backend.generate raises, and
    RequestFailed if that ends before every choice has.
    """
    if request.num_candidates > request.sampling.n:
        return _best_text(served, request)
    return _all_text(served, request)


async def _best_text(served: ServedModel, request: GenerationRequest) -> AsyncGenerator[TextDelta]:
    deltas: list[list[TextDelta]] = [[] for _ in range(request.num_candidates)]
    async with aclosing(_all_text(served, of_all_candidates(request))) as candidates:
        async for delta in candidates:
            deltas[delta.choice].append(delta)
    for delta in best_candidates([joined(parts) for parts in deltas], request):
        yield delta


async def _all_text(served: ServedModel, request: GenerationRequest) -> AsyncGenerator[TextDelta]:
    choices = [_ChoiceText(served, request) for _ in range(request.sampling.n)]
    num_running = len(choices)
    backend = served.backend
    tokens = backend.generate(request) if request.beams is None else search_beams(backend, request)
    with RequestObserver(served.metrics, request) as observer:
        async with aclosing(tokens) as deltas:
            async for delta in deltas:
                choice = choices[delta.choice]
                if choice.is_finished:
                    continue
                text_delta = choice.push(delta)
                observer.observe(text_delta)
                if choice.is_finished:
                    num_running -= 1
                    if delta.finish_reason is None:
                        backend.abort_choice(request.request_id, delta.choice)
                yield text_delta
                if not num_running:
                    break
        if num_running:
            raise RequestFailed("The request's tokens ended before its text was complete.")
