"""`best_of`: more choices are computed than the client gets."""

from collections.abc import Sequence
from dataclasses import replace

from baton_router.answer_choice import as_asked
from baton_router.backend import GenerationRequest
from baton_router.text_delta import TextDelta


def of_all_candidates(request: GenerationRequest) -> GenerationRequest:
    """The request that computes every candidate, with what they are judged by."""
    sampling = request.sampling
    num_logprobs = sampling.num_logprobs or 0
    return replace(request, sampling=replace(sampling, n=request.num_candidates, num_logprobs=num_logprobs))


def best_candidates(candidates: Sequence[TextDelta], request: GenerationRequest) -> list[TextDelta]:
    """The `n` that the client gets of its whole candidates: those of the highest mean log probability of
    their tokens, the best first. Log probabilities that it did not ask for are gone."""
    chosen = sorted(candidates, key=_mean_logprob, reverse=True)[: request.sampling.n]
    num_unseen = sum(len(candidate.tokens) for candidate in candidates)
    num_unseen -= sum(len(candidate.tokens) for candidate in chosen)
    first = candidates[0]
    best = [
        replace(
            candidate,
            choice=choice,
            tokens=as_asked(candidate.tokens, request.sampling),
            num_cached_prompt_tokens=0,
            prompt_logprobs=(),
        )
        for choice, candidate in enumerate(chosen)
    ]
    best[0] = replace(
        best[0],
        num_cached_prompt_tokens=first.num_cached_prompt_tokens,
        prompt_logprobs=first.prompt_logprobs,
        num_unseen_tokens=num_unseen,
    )
    return best


def _mean_logprob(candidate: TextDelta) -> float:
    logprobs = [token.logprob for token in candidate.tokens if token.logprob is not None]
    return sum(logprobs) / max(1, len(logprobs))
