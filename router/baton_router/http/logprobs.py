"""Log probabilities in OpenAI's two shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

from baton.core.sampling import SampledToken
from baton_router.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON can't hold


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[SampledToken]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    content = []
    for token in tokens:
        entry = _chat_entry(tokenizer, token.token_id, token.logprob)
        entry["top_logprobs"] = [_chat_entry(tokenizer, *top) for top in token.top_logprobs]
        content.append(entry)
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of one choice of a text completion; offsets count characters of its text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens, after=prompt)
        self._offset = 0

    def push(self, tokens: Sequence[SampledToken]) -> dict[str, list[Any]]:
        """The shape for the choice's next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push(token.token_id))
        return {
            "tokens": [token_text(self._tokenizer, token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: SampledToken) -> Mapping[str, float]:
        """The likeliest tokens, and the chosen one if it is not among them."""
        pairs = [*token.top_logprobs, (token.token_id, token.logprob)]
        return {token_text(self._tokenizer, token_id): _finite(logprob) for token_id, logprob in pairs}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is only a part of a character is spelled out as OpenAI does."""
    token_bytes = tokenizer.token_bytes(token_id)
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None else max(logprob, _LOWEST)
