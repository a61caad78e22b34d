"""What an engine's scheduler takes on at all."""

from dataclasses import dataclass
from itertools import chain

from baton.core.errors import InvalidRequest
from baton.core.request import EngineRequest


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one engine."""

    block_size: int  # tokens a page
    max_model_len: int  # tokens of one sequence, prompt and output
    max_num_seqs: int  # sequences in the batch
    max_num_batched_tokens: int  # tokens a step
    vocab_size: int  # token ids lie below it


def require_servable(request: EngineRequest, num_slots: int, config: SchedulerConfig) -> None:
    """Raises InvalidRequest where a request with so many places in the batch can never run."""
    num_tokens, longest = request.num_tokens, config.max_model_len - 1
    if not 0 < num_tokens <= longest:
        raise InvalidRequest(
            f"The prompt has {num_tokens} tokens; this worker takes 1 to {longest}.",
            param="prompt",
            code="context_length_exceeded",
        )
    if max(chain(request.prompt_token_ids, request.answered_token_ids)) >= config.vocab_size:
        raise InvalidRequest(
            f"The prompt has a token id above {config.vocab_size - 1}, the model's last.",
            param="prompt",
            code="token_id_out_of_range",
        )
    if num_slots > config.max_num_seqs:
        raise InvalidRequest(
            f"n is {num_slots}; this worker runs at most {config.max_num_seqs} sequences at once.",
            param="n",
            code="out_of_range",
        )
