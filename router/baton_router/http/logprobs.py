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
        self._tokens = _ChoiceTokens(tokenizer, request, request.token_ids, names_ids)

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
    """The `logprobs` of one choice of a text completion; offsets count characters of its text.

    An echoed prompt's tokens come before the choice's own. Nobody knows how likely its first one is: null.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        *,
        is_echoed: bool = False,
        names_ids: bool = False,
    ) -> None:
        """`names_ids`: tokens are named by their ids, as in token_id:5."""
        after = () if is_echoed else request.token_ids
        self._tokens = _ChoiceTokens(tokenizer, request, after, names_ids)
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
            is_known = token.logprob is not None
            shape["token_logprobs"].append(_finite(token.logprob) if is_known else None)
            shape["top_logprobs"].append(self._top(token) if is_known else None)
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


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[SampledToken]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of each token of a prompt, by id; null for the first."""
    return [None, *(_by_id(tokenizer, token) for token in tokens)] if prompt else []


def _by_id(tokenizer: Tokenizer, token: SampledToken) -> dict[str, Any]:
    """The token itself and the likeliest in its place; ranks are of those alone."""
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top_logprobs, 1)}
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token_id),
            "decoded_token": tokenizer.decode([token_id], skip_special_tokens=False),
        }
        for token_id, logprob in ((token.token_id, token.logprob), *token.top_logprobs)
    }


class _ChoiceTokens:
    """How tokens are spelled that come next in the text of one choice."""

    def __init__(
        self, tokenizer: Tokenizer, request: GenerationRequest, after: Sequence[int], names_ids: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._names_ids = names_ids
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=request.text.skip_special_tokens,
            spaces_between_special_tokens=request.text.spaces_between_special_tokens,
            after=after,
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
