"""Log probabilities in OpenAI's two shapes.

The bytes of a choice's tokens, joined, are those of its text, but for a stop string that was cut off: a token
that is no part of the text, such as the one that ended it, has its name and no bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from baton.core.sampling import SampledToken
from baton_router.backend import GenerationRequest
from baton_router.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON can't hold


class ChatLogprobs:
    """The `logprobs` of one choice of a chat."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, *, names_ids: bool = False) -> None:
        """`names_ids`: tokens are named by their ids, as in token_id:5."""
        self._tokens = _ChoiceTokens(tokenizer, request, names_ids)

    def push(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        """The shape for the choice's next tokens."""
        content = []
        for token in tokens:
            entry = self._entry(token.token_id, token.logprob)
            entry["top_logprobs"] = [self._entry(*top) for top in token.top_logprobs]
            content.append(entry)
            self._tokens.push(token.token_id)
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._tokens.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokens.bytes_of(token_id)),
        }


class CompletionLogprobs:
    """The `logprobs` of one choice of a text completion; offsets count characters of its text."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, *, names_ids: bool = False) -> None:
        """`names_ids`: tokens are named by their ids, as in token_id:5."""
        self._tokens = _ChoiceTokens(tokenizer, request, names_ids)
        self._offset = 0

    def push(self, tokens: Sequence[SampledToken]) -> dict[str, list[Any]]:
        """The shape for the choice's next tokens."""
        shape: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            shape["tokens"].append(self._tokens.text_of(token.token_id))
            shape["token_logprobs"].append(_finite(token.logprob))
            shape["top_logprobs"].append(self._top(token))
            shape["text_offset"].append(self._offset)
            self._offset += len(self._tokens.push(token.token_id))
        return shape

    def _top(self, token: SampledToken) -> Mapping[str, float]:
        """The likeliest tokens, and the chosen one if it is not among them; of equal texts the likelier."""
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top_logprobs, (token.token_id, token.logprob)):
            text = self._tokens.text_of(token_id)
            top[text] = max(_finite(logprob), top.get(text, _LOWEST))
        return top


class _ChoiceTokens:
    """How tokens are spelled that come next in the text of one choice."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, names_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._names_ids = names_ids
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=request.text.skip_special_tokens,
            spaces_between_special_tokens=request.text.spaces_between_special_tokens,
            after=request.token_ids,
        )
        self._end_token_ids = () if request.text.includes_stop else request.sampling.stop_token_ids

    def push(self, token_id: int) -> str:
        """The text that this token, the next one, makes certain."""
        return self._detokenizer.push(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token would add to the text."""
        return b"" if token_id in self._end_token_ids else self._detokenizer.bytes_of(token_id)

    def text_of(self, token_id: int) -> str:
        """Its text, or name; what is only a part of a character is spelled out as OpenAI does."""
        if self._names_ids:
            return f"token_id:{token_id}"
        token_bytes = self.bytes_of(token_id)
        if not token_bytes:
            special = self._tokenizer.special_text(token_id)
            if special is not None:
                return special
            if token_id in self._end_token_ids:
                token_bytes = self._tokenizer.token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None else max(logprob, _LOWEST)
