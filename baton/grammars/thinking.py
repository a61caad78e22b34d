"""A limit on the tokens that a model thinks with: when they are used up, the mark that ends thinking is the
only thing that may come.

It stands around what the answer has to look like, if that is anything, and is as much a function of the
output's tokens. Marks are looked for in the bytes of tokens, since a model may write one in several ways.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.grammar import Grammar, TokenMatcher


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around thinking."""

    begins: tuple[bytes, ...]
    ends: tuple[bytes, ...]
    end_token_ids: tuple[int, ...]  # how the first of `ends` is written where it has to be

    @property
    def longest(self) -> int:
        """Of them, in bytes."""
        return max(map(len, (*self.begins, *self.ends)), default=0)


class ThinkingGrammar:
    """Implements `core.grammar.Grammar`."""

    def __init__(
        self,
        marks: Marks,
        bytes_of: Callable[[int], bytes],
        vocab_size: int,
        *,
        max_tokens: int,
        is_open: bool,
        content: Grammar | None,
    ) -> None:
        """`bytes_of` gives a token's; `max_tokens`: between the marks, all thinking of an answer together.
        `is_open`: the prompt ends within thinking. `content`: of the whole answer, marks included."""
        self.marks = marks
        self.bytes_of = bytes_of
        self.num_mask_bytes = (vocab_size + 7) // 8
        self.max_tokens = max_tokens
        self.is_open = is_open
        self.content = content

    def matcher(self) -> "ThinkingMatcher":
        """See Grammar."""
        return ThinkingMatcher(self, None if self.content is None else self.content.matcher())


class ThinkingMatcher:
    """Implements `core.grammar.TokenMatcher`."""

    def __init__(self, grammar: ThinkingGrammar, content: TokenMatcher | None) -> None:
        self.failure: str | None = None
        self._grammar = grammar
        self._content = content
        self._num_taken = 0
        self._is_open = grammar.is_open
        self._num_thought = 0
        self._num_forced = 0  # tokens of the end that have come
        self._tail = b""  # where a mark may have begun

    def allowed(self, output_token_ids: Sequence[int]) -> bytes:
        """See TokenMatcher."""
        for token_id in output_token_ids[self._num_taken :]:
            self._read(token_id)
        self._num_taken = len(output_token_ids)
        if self._content is None:
            mask = b"\xff" * self._grammar.num_mask_bytes
        else:
            mask = self._content.allowed(output_token_ids)
            self.failure = self._content.failure
        return self._with_budget(mask)

    def _with_budget(self, mask: bytes) -> bytes:
        if not self._is_used_up or self.failure is not None:
            return mask
        place, bit = divmod(self._grammar.marks.end_token_ids[self._num_forced], 8)
        if not mask[place] >> bit & 1:
            return mask  # within a character, say: the end comes right behind it
        return bytes(place) + bytes([1 << bit]) + bytes(len(mask) - place - 1)

    @property
    def _is_used_up(self) -> bool:
        return self._is_open and self._num_thought >= self._grammar.max_tokens

    def _read(self, token_id: int) -> None:
        marks = self._grammar.marks
        if self._is_used_up:
            is_next = token_id == marks.end_token_ids[self._num_forced]
            self._num_forced = self._num_forced + 1 if is_next else 0
        self._num_thought += self._is_open
        self._tail += self._grammar.bytes_of(token_id)
        if any(mark in self._tail for mark in (marks.ends if self._is_open else marks.begins)):
            self._is_open = not self._is_open
            self._num_forced = 0
            self._tail = b""
        elif self._num_forced == len(marks.end_token_ids):  # its bytes are other ones, so that none was found
            self._is_open = False
        self._tail = self._tail[-marks.longest :]
