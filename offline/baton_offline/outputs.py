"""What programs get: one object a prompt, with the fields that users of vLLM know."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.sampling import SampledToken
from baton_router.text.tokenizer import Tokenizer
from baton_router.text_delta import TextDelta


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token that might have come, and how likely it was."""

    logprob: float  # natural log
    rank: int | None  # 1: the likeliest; None: below those that were asked for
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # of each token; None: not asked for
    finish_reason: str | None = None  # "stop", "length" or "repetition"; None: it goes on
    stop_reason: str | int | None = None  # the stop string or token of yours that ended it


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None  # None: it was given in token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    # Of each token of the prompt, None for the first; None: not asked for
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether all its answers are complete."""
        return all(output.finish_reason is not None for output in self.outputs)

    def add(self, delta: TextDelta, tokenizer: Tokenizer) -> None:
        """Take in what has come of one choice."""
        output = self.outputs[delta.choice]
        output.text += delta.text
        output.token_ids += (token.token_id for token in delta.tokens)
        self.num_cached_tokens += delta.num_cached_prompt_tokens
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason.value
            output.stop_reason = delta.stop_reason
        if delta.prompt_logprobs:
            found = [_logprobs(token, tokenizer) for token in delta.prompt_logprobs]
            self.prompt_logprobs = [None, *found]
        _add_logprobs(output, delta.tokens, tokenizer)


def _add_logprobs(output: CompletionOutput, tokens: Sequence[SampledToken], tokenizer: Tokenizer) -> None:
    for token in tokens:
        if token.logprob is None:
            continue
        output.logprobs = output.logprobs or []
        output.logprobs.append(_logprobs(token, tokenizer))
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + token.logprob


def _logprobs(token: SampledToken, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The token and the likeliest in its place, the likeliest first."""
    assert token.logprob is not None
    ranks = range(1, len(token.top_logprobs) + 1)
    ranked: list[tuple[int, float, int | None]] = [
        (*entry, rank) for entry, rank in zip(token.top_logprobs, ranks, strict=True)
    ]
    if token.token_id not in dict(token.top_logprobs):
        ranked.append((token.token_id, token.logprob, None))
    return {
        token_id: Logprob(logprob, rank, tokenizer.decode([token_id], skip_special_tokens=False))
        for token_id, logprob, rank in ranked
    }
