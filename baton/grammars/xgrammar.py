"""Grammars by xgrammar (https://xgrammar.mlc.ai): formats are its own language. It needs torch."""

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers
import torch
from llguidance import LLTokenizer

from baton.core.errors import InvalidRequest
from baton.grammars.formats import FIELD, Format
from baton.grammars.guidance import special_tokens
from baton.grammars.schemas import without_notes

_MAX_WHITE_SPACE = 24
_MAX_THREADS = 2
_CACHE_BYTES = 64 << 20  # of each of its compilers
_MAX_COMPILERS = 8  # clients choose which there are


class XgrammarCompiler:
    """Implements `baton.grammars.compiler.Compiler` for one model's vocabulary. Any thread."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raises InvalidRequest where xgrammar is not installed."""
        try:
            self._library = importlib.import_module("xgrammar")
        except ImportError as error:
            raise InvalidRequest(
                f"This worker has no xgrammar ({error}): install baton-serve[structured-outputs] there, or "
                "start the router with --structured-outputs-backend guidance."
            ) from None
        self._vocab_size = vocab_size
        self._ends = list(eos_token_ids)
        self._special = special_tokens(backend)
        ids = LLTokenizer(backend.to_str())
        self._texts = [ids.decode_bytes([token_id]) for token_id in range(ids.vocab_size)]
        self._compiler = lru_cache(_MAX_COMPILERS)(self._new_compiler)

    def compile(self, form: Format) -> "XgrammarGrammar":
        """Raises InvalidRequest, which says why a format can't become a grammar."""
        used = frozenset(text for text in self._special if text and _holds(form, text))
        tag = {"type": "structural_tag", "format": _translated(form)}
        try:
            compiled = self._compiler(used).compile_structural_tag(tag)
        except Exception as error:  # the library raises several kinds, RuntimeError among them
            reason = str(error).strip().splitlines()
            raise InvalidRequest(
                f"{FIELD} can't be used: {reason[-1] if reason else type(error).__name__}.",
                param=FIELD,
                code="invalid_format",
            ) from None
        return XgrammarGrammar(self._library.GrammarMatcher(compiled), self._vocab_size)

    def _new_compiler(self, used: frozenset[str]) -> Any:
        """For formats that hold the special tokens `used`: those are text to it, and no others."""
        texts = list(self._texts)
        for text, token_id in self._special.items():
            texts[token_id] = text.encode() if text in used else b""
        info = self._library.TokenizerInfo(texts, vocab_size=self._vocab_size, stop_token_ids=self._ends)
        return self._library.GrammarCompiler(info, max_threads=_MAX_THREADS, cache_limit_bytes=_CACHE_BYTES)


class XgrammarGrammar:
    """Implements `core.grammar.Grammar`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def matcher(self) -> "XgrammarMatcher":
        """See Grammar."""
        return XgrammarMatcher(self._matcher.fork(), self._vocab_size)


class XgrammarMatcher:
    """Implements `core.grammar.TokenMatcher`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.failure: str | None = None
        self._matcher = matcher
        self._mask = torch.empty(1, (vocab_size + 31) // 32, dtype=torch.int32)
        self._num_taken = 0

    def allowed(self, output_token_ids: Sequence[int]) -> bytes:
        """See TokenMatcher."""
        for token_id in output_token_ids[self._num_taken :]:
            self._num_taken += 1
            if self._matcher.is_terminated() or not self._matcher.accept_token(token_id):
                return self._fail(f"token {token_id} is not allowed there")
        self._mask.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._mask)
        if not self._mask.any():
            return self._fail("no token of the model's may come next")
        return self._mask.numpy().tobytes()

    def _fail(self, reason: str) -> bytes:
        self.failure = f"The format of the answer can't be kept after {self._num_taken} tokens: {reason}"
        return b"\xff" * self._mask.nbytes


def _translated(form: Format) -> dict[str, Any]:
    """The same in xgrammar's words."""
    kind = form["type"]
    if kind == "json_schema":
        if form.get("is_compact"):
            raise InvalidRequest("xgrammar can't keep JSON without white space.", param=FIELD)
        schema = without_notes(form["json_schema"])
        return {"type": kind, "json_schema": schema, "max_whitespace_cnt": _MAX_WHITE_SPACE}
    if kind == "grammar":
        syntax = "ebnf" if "::=" in form["grammar"] else "lark"
        return {"type": kind, "grammar": form["grammar"], "syntax": syntax}
    translated = {key: value for key, value in form.items() if key != "backend" and value is not None}
    for key in ("elements", "tags"):
        if key in form:
            translated[key] = [_translated(inner) for inner in form[key]]
    if isinstance(form.get("content"), Mapping):
        translated["content"] = _translated(form["content"])
    return translated


def _holds(value: Any, text: str) -> bool:
    """Whether the text stands somewhere in a format."""
    if isinstance(value, str):
        return text in value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_holds(part, text) for part in inner)
