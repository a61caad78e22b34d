"""Limits of thinking for one model's vocabulary."""

from functools import lru_cache

import tokenizers
from llguidance import LLTokenizer

from baton.core.errors import InvalidRequest
from baton.core.grammar import Grammar
from baton.grammars.formats import FIELD, Format
from baton.grammars.thinking import Marks, ThinkingGrammar


class ThinkingCompiler:
    """Makes grammars of formats of the type `thinking_budget`. Any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's, which may be larger than the tokenizer's."""
        self._backend = backend
        self._vocab_size = vocab_size
        size = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
        self._tokenizer = LLTokenizer(backend.to_str(), n_vocab=size)
        self._bytes_of = lru_cache(maxsize=None)(self._decoded)

    def grammar(self, form: Format, content: Grammar | None) -> Grammar:
        """`content` is the whole answer's, if that has to look like anything. Raises InvalidRequest."""
        ends = [form["ends"]] if isinstance(form["ends"], str) else form["ends"]
        end_token_ids = self._backend.encode(ends[0], add_special_tokens=False).ids
        if not end_token_ids or max(end_token_ids) >= self._vocab_size:
            raise InvalidRequest(f"This model can't write {ends[0]!r}, which ends thinking.", param=FIELD)
        marks = Marks(
            tuple(text.encode() for text in form["begins"]),
            tuple(text.encode() for text in ends),
            tuple(end_token_ids),
        )
        return ThinkingGrammar(
            marks,
            self._bytes_of,
            self._vocab_size,
            max_tokens=form["max_tokens"],
            is_open=form["is_open"],
            content=content,
        )

    def _decoded(self, token_id: int) -> bytes:
        decoded: bytes = self._tokenizer.decode_bytes([token_id])
        return decoded
