"""Python's literals become JSON while they come: a token at a time, without nesting of calls."""

import re

from baton_router.chat_output.json_text import to_string
from baton_router.chat_output.lexer import Lexer, Steps, Take, stops

_WORD = re.compile(r"[^\s,:=()\[\]{}'\"]*")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_CONSTANTS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_OPENED = {"[": "[", "(": "[", "{": "{"}
_CLOSED = {"]": "[", ")": "[", "}": "{"}
_MARKS = frozenset("[](){},:")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES = {
    **{"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v"},
    **{"\n": "", "\\": "\\", "'": "'", '"': '"', "/": "/"},
}


def read_literal(lexer: Lexer, take: Take) -> Steps[bool]:
    """Takes one value as JSON; false where it breaks off. A word that is no constant is a string."""
    writer = _Writer(take)
    while True:
        character = yield from lexer.white_space()
        if character in _MARKS:
            if not writer.mark(character):
                return False
            yield from lexer.characters(1, _nothing)
        else:
            item = yield from _item(lexer)
            if item is None or not writer.item(item):
                return False
        if writer.is_complete:
            return True


def literal_to_json(text: str) -> str | None:
    """A whole value as JSON; None where it is none, or more than one."""
    lexer, pieces = Lexer(), list[str]()
    lexer.push(text)
    lexer.end()
    try:
        next(read_literal(lexer, pieces.append))
    except StopIteration as done:
        rest: list[str] = []
        for _ in lexer.text_until(stops(), rest.append):
            pass
        return "".join(pieces) if done.value and not "".join(rest).strip() else None
    raise AssertionError("a whole text needs no more text")


class _Writer:
    """Writes the JSON of one value: what is open, and what may come next."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._open: list[str] = []
        self._before = ""  # goes in front of the next item, if one comes
        self._is_key = False
        self.needs_item = True

    @property
    def is_complete(self) -> bool:
        return not self._open and not self.needs_item

    def mark(self, character: str) -> bool:
        if character in _OPENED:
            return self._begin(_OPENED[character])
        return self._end(_CLOSED[character]) if character in _CLOSED else self._separate(character)

    def _begin(self, bracket: str) -> bool:
        if not self.needs_item or self._is_key:
            return False
        self._take(self._before + bracket)
        self._open.append(bracket)
        self._begin_item("")
        return True

    def _end(self, bracket: str) -> bool:
        lacks_value = self._before == ": " if self.needs_item else self._is_key
        if not self._open or self._open[-1] != bracket or lacks_value:
            return False
        self._open.pop()
        self._take("]" if bracket == "[" else "}")
        self.needs_item = self._is_key = False
        return True

    def _separate(self, character: str) -> bool:
        if self.needs_item or not self._open or (character == ":") != self._is_key:
            return False
        self._begin_item(", " if character == "," else ": ")
        return True

    def item(self, item: str) -> bool:
        if not self.needs_item:
            return False
        self._take(self._before + (to_string(item) if self._is_key and not item.startswith('"') else item))
        self.needs_item = False
        return True

    def _begin_item(self, before: str) -> None:
        self._before = before
        self.needs_item = True
        self._is_key = bool(self._open) and self._open[-1] == "{" and before != ": "


def _item(lexer: Lexer) -> Steps[str | None]:
    """A string or a word as JSON; None if there is none, or the text ends in it."""
    quote = yield from lexer.any_of('"', "'", '"""', "'" * 3)
    if quote:
        return (yield from _string(lexer, quote))
    pieces: list[str] = []
    yield from lexer.run(_WORD, pieces.append)
    word = "".join(pieces)
    if not word or word in _CONSTANTS:
        return _CONSTANTS.get(word)
    return word if _NUMBER.fullmatch(word) else to_string(word)


def _string(lexer: Lexer, quote: str) -> Steps[str | None]:
    pieces: list[str] = []
    while True:
        stop = yield from lexer.text_until(stops("\\", quote), pieces.append)
        if stop == quote:
            return to_string(_unescaped("".join(pieces)))
        if not stop:
            return None
        pieces.append(stop)
        yield from lexer.characters(1, pieces.append)


def _unescaped(source: str) -> str:
    """The text of a string's source; JSON's escapes and Python's."""
    text = _ESCAPE.sub(lambda match: _character(match[1]), source)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _character(escape: str) -> str:
    if escape in _ESCAPES:
        return _ESCAPES[escape]
    if escape[0] in "uUx" and len(escape) > 1:
        code = int(escape[1:], 16)
        return chr(code) if code <= 0x10FFFF else "�"
    return chr(int(escape, 8)) if escape.isdigit() else "\\" + escape


def _nothing(_: str) -> None:
    pass
