"""Grammars by llguidance (https://github.com/guidance-ai/llguidance): an Earley parser over derivatives of
regular expressions, about 50 microseconds a mask."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import tokenizers
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from baton.core.errors import InvalidRequest
from baton.grammars import formats
from baton.grammars.formats import FIELD, Format
from baton.grammars.lark import to_lark
from baton.grammars.schemas import faulty_part

_SILENT = 0

# What the library's short words mean.
_WORDS: Mapping[str, str] = {
    "NoExtensionBias": "no text matches it",
    "NoExtension": "no text matches it",
    "LexerTooComplex": "it is too complex",
    "ParserTooComplex": "it is too complex",
}


class GuidanceCompiler:
    """Implements `baton.grammars.compiler.Compiler` for one model's vocabulary. Any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size` is the model's, which may be larger than the tokenizer's."""
        self._special_tokens = special_tokens(backend)
        size = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
        self._tokenizer = LLTokenizer(backend.to_str(), n_vocab=size, eos_token=list(eos_token_ids) or None)
        self._num_mask_bytes = (vocab_size + 7) // 8

    def compile(self, form: Format) -> "GuidanceGrammar":
        """Raises InvalidRequest, which says where a format can't become a grammar."""
        grammar = _grammar(form, self._special_tokens)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=_SILENT, limits=_limits())
        _require_match(form, matcher)
        return GuidanceGrammar(matcher, self._num_mask_bytes)


class GuidanceGrammar:
    """Implements `core.grammar.Grammar`."""

    def __init__(self, matcher: LLMatcher, num_mask_bytes: int) -> None:
        self._matcher = matcher
        self._num_mask_bytes = num_mask_bytes

    def matcher(self) -> "GuidanceMatcher":
        """See Grammar."""
        return GuidanceMatcher(self._matcher.deep_copy(), self._num_mask_bytes)


class GuidanceMatcher:
    """Implements `core.grammar.TokenMatcher`."""

    def __init__(self, matcher: LLMatcher, num_mask_bytes: int) -> None:
        self.failure: str | None = None
        self._matcher = matcher
        self._num_mask_bytes = num_mask_bytes
        self._num_taken = 0

    def allowed(self, output_token_ids: Sequence[int]) -> bytes:
        """See TokenMatcher."""
        new = output_token_ids[self._num_taken :]
        self._num_taken += len(new)
        if new and not self._matcher.consume_tokens(list(new)):
            return self._fail(self._matcher.get_error())
        mask = self._matcher.compute_bitmask()[: self._num_mask_bytes]
        if self._matcher.is_error():  # its mask then is that of a complete answer
            return self._fail(self._matcher.get_error())
        if mask.count(0) == len(mask):
            return self._fail(self._matcher.get_error() or "no token of the model's may come next")
        return mask

    def _fail(self, reason: str) -> bytes:
        where = f"after {self._num_taken} tokens"
        self.failure = f"The format of the answer can't be kept {where}: {_reason(reason)}"
        return b"\xff" * self._num_mask_bytes


def check(form: Format) -> None:
    """Raises InvalidRequest, which says where a format can't become a grammar of any model."""
    if error := _error(form):
        raise _invalid(form, error)
    _require_match(form, LLMatcher(_bytes(), _grammar(form, {}), log_level=_SILENT, limits=_limits()))


def special_tokens(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Ids of the tokens that are no text, by what they are written as."""
    added = backend.get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


@cache
def _bytes() -> LLTokenizer:
    """A vocabulary of all bytes, for what does not depend on a model's."""
    return LLTokenizer("byte")


def _limits() -> LLParserLimits:
    return LLParserLimits(verbose_errors=False)


def _require_match(form: Format, matcher: LLMatcher) -> None:
    """Raises InvalidRequest for what no text matches, or is too complex: the first token alone shows it."""
    first = matcher.deep_copy()
    if not first.is_error():
        first.compute_bitmask()
    if first.is_error():
        raise _invalid(form, first.get_error())


def _error(form: Format) -> str:
    try:
        return LLMatcher.validate_grammar(_grammar(form, {}), None)
    except ValueError as error:
        return str(error)


def _is_fine(schema: Any) -> bool:
    return not _error(formats.json_schema(schema))


def _grammar(form: Format, special: Mapping[str, int]) -> str:
    return LLMatcher.grammar_from_lark(to_lark(form, special))


def _invalid(form: Format, error: str) -> InvalidRequest:
    """What is wrong, and where if it is in a schema."""
    for schema_form in _schemas(form):
        if _error(schema_form):
            path, part = faulty_part(schema_form["json_schema"], _is_fine)
            reason = _error(formats.json_schema(part)) or error
            where = f"At {path} of the JSON schema" if path else "In the JSON schema"
            shown = json.dumps(part, ensure_ascii=False)[:200]
            return InvalidRequest(
                f"{where}: {_reason(reason)}; it is {shown}.", param=FIELD, code="invalid_json_schema"
            )
    return InvalidRequest(f"{FIELD} can't be used: {_reason(error)}.", param=FIELD, code="invalid_format")


def _reason(error: str) -> str:
    """The library's message less its picture of our grammar."""
    text = error.split("\n   1 |")[0].removesuffix("<non-verbose/>").strip()
    text = _WORDS.get(text, text)
    return text.split("failed to compile JSON schema: ", 1)[-1]


def _schemas(form: Format) -> list[Format]:
    if form["type"] == "json_schema":
        return [form]
    inner = [*form.get("elements", ()), *form.get("tags", ())]
    if isinstance(form.get("content"), Mapping):
        inner.append(form["content"])
    return [schema for part in inner for schema in _schemas(part)]
