"""Grammars of one model by the text of their format, each compiled once.

A request names its backend in the text, so that a worker needs no setting of its own and uses what the router
has checked.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from baton.core.errors import InvalidRequest
from baton.core.grammar import Grammar
from baton.grammars.formats import Format, content_of, from_text

if TYPE_CHECKING:
    from baton.grammars.thinking_compiler import ThinkingCompiler
    from baton.tokenizer.backend import TokenizerFiles

GUIDANCE, XGRAMMAR = "guidance", "xgrammar"

_MAX_GRAMMARS = 256


class Compiler(Protocol):
    """Makes grammars of formats for one vocabulary."""

    def compile(self, form: Format) -> Grammar:
        """Raises InvalidRequest, which says where a format can't become a grammar."""
        ...


class GrammarCompiler:
    """The grammars of one model; any thread. Keeps the last ones used."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Reads the model's tokenizer when the first grammar is asked for."""
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._backends: dict[str, Compiler] = {}
        self._thinking_compiler: ThinkingCompiler | None = None
        self._known: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()  # held for no time, as the event loop waits for it
        self._backends_lock = threading.Lock()

    def known(self, text: str) -> Grammar | None:
        """The grammar of a format, if it is compiled already."""
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
            return self._known.get(text)

    def compile(self, text: str) -> Grammar:
        """The grammar of a format; some milliseconds, and up to a second for the most complex ones.

        Raises InvalidRequest, which says what is wrong with it.
        """
        if (known := self.known(text)) is not None:
            return known
        grammar = self._new_grammar(from_text(text))
        with self._lock:
            self._known[text] = grammar
            while len(self._known) > _MAX_GRAMMARS:
                self._known.popitem(last=False)
        return grammar

    def _new_grammar(self, form: Format) -> Grammar:
        content, inner = content_of(form), None
        if content is not None:
            inner = self._backend(form.get("backend", GUIDANCE)).compile(content)
        if content is form and inner is not None:
            return inner
        return self._thinking().grammar(form, inner)

    def _thinking(self) -> "ThinkingCompiler":
        from baton.grammars.thinking_compiler import ThinkingCompiler

        with self._backends_lock:
            if self._thinking_compiler is None:
                backend = self._tokenizer_files().backend
                self._thinking_compiler = ThinkingCompiler(backend, self._vocab_size)
            return self._thinking_compiler

    def _backend(self, name: str) -> Compiler:
        with self._backends_lock:
            if name not in self._backends:
                self._backends[name] = self._new_backend(name)
            return self._backends[name]

    def _new_backend(self, name: str) -> Compiler:
        # What only grammars need is imported where one is asked for.
        files = self._tokenizer_files()
        ends = self._eos_token_ids or files.eos_token_ids
        if name == GUIDANCE:
            from baton.grammars.guidance import GuidanceCompiler

            return GuidanceCompiler(files.backend, self._vocab_size, ends)
        if name == XGRAMMAR:
            from baton.grammars.xgrammar import XgrammarCompiler

            return XgrammarCompiler(files.backend, self._vocab_size, ends)
        raise InvalidRequest(f"This worker has no backend '{name}' for structured outputs.")

    def _tokenizer_files(self) -> "TokenizerFiles":
        from baton.tokenizer.backend import read_tokenizer

        return read_tokenizer(self._model_dir)
