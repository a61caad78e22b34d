"""What a step sampled becomes the next tokens of its sequence and of the choices that fork from it."""

from collections.abc import Mapping

from baton.core.request import SequenceState, TokenEvent
from baton.core.rows import choices_to_sample
from baton.core.sampling import SampledToken
from baton.core.stopping import finish_reason


def take_tokens(
    sequence: SequenceState, samples: Mapping[int, SampledToken], max_model_len: int
) -> tuple[list[SequenceState], list[TokenEvent]]:
    """Append each choice's token, to a new sequence where the choice has none yet.

    `samples`: the token of each choice, of which some may have been dropped meanwhile. Returns the sequences
    that go on, and the events of all.
    """
    going_on, events = [], []
    for choice in choices_to_sample(sequence):
        taker = (
            sequence
            if choice == sequence.choice
            else SequenceState(sequence.request, choice, sequence.arrival)
        )
        event = _take_token(taker, samples[choice], max_model_len)
        events.append(event)
        if event.finish_reason is None:
            going_on.append(taker)
    return going_on, events


def _take_token(sequence: SequenceState, token: SampledToken, max_model_len: int) -> TokenEvent:
    sequence.output_token_ids.append(token.token_id)
    num_output = len(sequence.output_token_ids)
    request = sequence.request
    reason = finish_reason(request.sampling, token.token_id, num_output, sequence.num_tokens, max_model_len)
    num_cached = sequence.num_cached_prompt_tokens if num_output == 1 else 0
    return TokenEvent(request.request_id, sequence.choice, num_output - 1, token, reason, num_cached)
