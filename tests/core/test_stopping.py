"""When a choice ends."""

import pytest

from baton.core.sampling import SamplingParams
from baton.core.stopping import FinishReason, finish_reason

PARAMS = SamplingParams(max_tokens=5, min_tokens=2, stop_token_ids=(7, 8))


@pytest.mark.parametrize(
    ("token_id", "num_output_tokens", "num_tokens", "expected"),
    [
        (1, 3, 10, None),
        (7, 3, 10, FinishReason.STOP),
        (8, 3, 10, FinishReason.STOP),
        (7, 2, 10, None),  # one of the min_tokens: the sampler forbids stop tokens among them
        (1, 4, 10, None),
        (1, 5, 10, FinishReason.LENGTH),
        (7, 5, 10, FinishReason.STOP),  # both: the model had ended by itself
        (1, 1, 19, None),
        (1, 1, 20, FinishReason.LENGTH),  # the context is full
        (7, 2, 20, FinishReason.LENGTH),
    ],
)
def test_finish_reason(
    token_id: int, num_output_tokens: int, num_tokens: int, expected: FinishReason | None
) -> None:
    assert finish_reason(PARAMS, token_id, num_output_tokens, num_tokens, max_model_len=20) is expected


def test_the_first_token_can_end_a_choice() -> None:
    stops_at_once = SamplingParams(stop_token_ids=(7,))
    assert finish_reason(stops_at_once, 7, 1, 10, 20) is FinishReason.STOP
    assert finish_reason(SamplingParams(max_tokens=1), 1, 1, 10, 20) is FinishReason.LENGTH


def test_reasons_are_openais_words_and_vllms() -> None:
    assert {reason.value for reason in FinishReason} == {"stop", "length", "repetition"}
