"""Beam search as programs ask for it, and what they get."""

import dataclasses

from baton_offline.outputs import CompletionOutput, Logprob, RequestOutput
from baton_offline.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """A search with `beam_width` beams; log probabilities are divided by length ** length_penalty."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def sampling_params(self) -> SamplingParams:
        """The same as a request says it."""
        return SamplingParams(
            n=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            use_beam_search=True,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=0,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One beam."""

    tokens: list[int]  # the prompt's too
    text: str  # of the answer alone
    cum_logprob: float  # of the answer, its end included
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None
    stop_reason: str | int | None


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The beams of a prompt, the best first."""

    sequences: list[BeamSearchSequence]


def beam_search_output(output: RequestOutput, params: BeamSearchParams) -> BeamSearchOutput:
    """What programs get of a search's answer."""
    return BeamSearchOutput([_sequence(output, choice, params) for choice in output.outputs])


def _sequence(
    output: RequestOutput, choice: CompletionOutput, params: BeamSearchParams
) -> BeamSearchSequence:
    has_end = choice.finish_reason == "stop" and not params.include_stop_str_in_output
    answer = choice.token_ids[:-1] if has_end else choice.token_ids
    return BeamSearchSequence(
        [*output.prompt_token_ids, *answer],
        choice.text,
        choice.cumulative_logprob or 0.0,
        choice.logprobs or [],
        choice.finish_reason,
        choice.stop_reason,
    )
