"""What comes of tokens: a piece of one choice's text."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of one choice. `text` may lag behind `tokens`: it never ends within a character or
    within what could become a stop string. The text of a token that ended the choice is left out unless the
    request says otherwise."""

    choice: int
    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    num_cached_prompt_tokens: int = 0
    prompt_logprobs: tuple[SampledToken, ...] = ()  # see TokenDelta
    # The stop string or the client's stop token that ended the choice; None: the model itself, or its length.
    stop_reason: str | int | None = None
    num_unseen_tokens: int = 0  # that were computed for it beside its own: see best_of


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """All that has come of one choice, as one delta."""
    num_cached = sum(delta.num_cached_prompt_tokens for delta in deltas)
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    last = deltas[-1]
    prompt = tuple(token for delta in deltas for token in delta.prompt_logprobs)
    return TextDelta(
        last.choice,
        text,
        tokens,
        last.finish_reason,
        num_cached,
        prompt_logprobs=prompt,
        stop_reason=last.stop_reason,
    )
