"""When a choice ends, as far as token ids can tell; stop strings are the router's, which knows text."""

from enum import Enum

from baton.core.sampling import SamplingParams


class FinishReason(Enum):
    """Why a choice ended, in OpenAI's words and vLLM's."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"  # vLLM's; the router's alone


def finish_reason(
    params: SamplingParams, token_id: int, num_output_tokens: int, num_tokens: int, max_model_len: int
) -> FinishReason | None:
    """Whether the choice whose newest token is `token_id` ends with it.

    `num_output_tokens` and `num_tokens` (prompt + output) count the newest token. A stop token before
    `min_tokens` can't come up, as the sampler forbids it, unless a grammar allows nothing else.
    """
    may_stop = num_output_tokens > params.min_tokens or params.grammar
    if token_id in params.stop_token_ids and may_stop:
        return FinishReason.STOP
    if ends_by_length(params, num_output_tokens, num_tokens, max_model_len):
        return FinishReason.LENGTH
    return None


def ends_by_length(
    params: SamplingParams, num_output_tokens: int, num_tokens: int, max_model_len: int
) -> bool:
    """Whether a choice of so many tokens ends, whatever they are."""
    return num_output_tokens >= params.max_tokens or num_tokens >= max_model_len
