"""Which answers a client gets of those that are computed: `best_of`, and beam search."""

from collections.abc import Mapping
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.fields import Between, rows
from baton.core.sampling import MAX_CHOICES, MAX_LOGPROBS, SampledToken, SamplingParams
from baton_router.backend import GenerationRequest, TextOptions
from baton_router.beams import BeamSearch, num_candidates

_LENGTH_PENALTY = Between(-100.0, 100.0)
_PLAIN = SamplingParams()
# What beams keep. Settings of sampling say nothing to them, since nothing is drawn.
_OF_BEAMS = frozenset(
    {"n", "max_tokens", "stop_token_ids", "logprobs", "prompt_logprobs"}
    | {"temperature", "top_k", "top_p", "min_p", "seed"}
)


def read_answer_choice(
    fields: Mapping[str, Any], sampling: SamplingParams, text: TextOptions
) -> tuple[int, BeamSearch | None]:
    """How many candidates are computed for the best of them, 0 for no more than there are choices, and the
    search that finds them.

    `fields` may hold best_of, use_beam_search and length_penalty. Raises InvalidRequest.
    """
    best_of = fields.get("best_of")
    if best_of is not None:
        Between(sampling.n, MAX_CHOICES).check("best_of", best_of)
    if not fields.get("use_beam_search"):
        _refuse_penalty(fields)
        return best_of or 0, None
    _refuse_what_beams_lack(fields, sampling, text)
    search = BeamSearch(max(sampling.n, best_of or 0), _length_penalty(fields))
    most = MAX_LOGPROBS // num_candidates(1, len(sampling.stop_token_ids))
    if search.width > most:
        raise InvalidRequest(
            f"A beam search with {len(sampling.stop_token_ids)} tokens that end answers has at most {most} "
            f"beams, but this has {search.width}.",
            param="n",
            code="out_of_range",
        )
    return 0, search


def as_asked(tokens: tuple[SampledToken, ...], sampling: SamplingParams) -> tuple[SampledToken, ...]:
    """Tokens as the client gets them: those by which answers are judged may say more than it asked for."""
    if sampling.num_logprobs is not None:
        return tokens
    return tuple(SampledToken(token.token_id) for token in tokens)


def check_streamed(request: GenerationRequest) -> None:
    """Raises InvalidRequest where an answer can't be streamed."""
    if request.beams is not None or request.num_candidates > request.sampling.n:
        name = "best_of" if request.beams is None else "use_beam_search"
        raise InvalidRequest(
            f"With {name} there is no answer before all are complete: leave out stream.", param="stream"
        )


def _length_penalty(fields: Mapping[str, Any]) -> float:
    penalty = fields.get("length_penalty")
    if penalty is None:
        return 1.0
    _LENGTH_PENALTY.check("length_penalty", penalty)
    return float(penalty)


def _refuse_penalty(fields: Mapping[str, Any]) -> None:
    if fields.get("length_penalty") not in (None, 1):
        raise InvalidRequest("length_penalty needs use_beam_search.", param="length_penalty")


def _refuse_what_beams_lack(fields: Mapping[str, Any], sampling: SamplingParams, text: TextOptions) -> None:
    wanted = [
        row.public_name
        for row in rows(SamplingParams)
        if row.public_name not in _OF_BEAMS and getattr(sampling, row.name) != getattr(_PLAIN, row.name)
    ]
    wanted += ["stop"] if text.stop_strings else []
    wanted += ["repetition_detection"] if text.repetition.max_pattern_size else []
    if wanted:
        raise InvalidRequest(
            f"use_beam_search does not go together with {wanted[0]}.",
            param=wanted[0],
            code="unsupported_parameter",
        )
