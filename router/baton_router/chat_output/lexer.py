"""Reads a text that comes in pieces.

A reader of a format is a generator: it yields where it needs more text, and goes on when there is more, or no
more will come. What it takes never depends on how the text was cut into pieces, since each step here waits
until what follows can't change its result.
"""

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Take = Callable[[str], object]  # gets text as it becomes certain

MAX_HELD = 65_536  # characters that may turn out to be text after all

_WHITE_SPACE = re.compile(r"\s*")


class TooLong(Exception):
    """What may be something else than text is longer than MAX_HELD; the text is to be read as text."""


def _nothing(_: str) -> None:
    pass


class Stops:
    """Texts to look for; make them with `stops`."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(sorted({text for text in texts if text}, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self._beginnings = frozenset(text[:size] for text in self.texts for size in range(1, len(text)))
        self._longest = len(self.texts[0]) if self.texts else 0

    def find(self, text: str, start: int, is_whole: bool) -> tuple[int, str]:
        """Where the first stop begins, and it: the longest of those that begin there.

        No stop and where one may begin, as far as the text goes, if that is not certain.
        """
        match = self._pattern.search(text, start)
        end = len(text) if match is None else match.start()
        if not is_whole:
            for at in range(max(start, len(text) - self._longest + 1), min(end + 1, len(text))):
                if text[at:] in self._beginnings:
                    return at, ""
        return end, "" if match is None else match[0]

    def at_start(self, text: str, is_whole: bool) -> str | None:
        """The longest stop that the text starts with; None if that is not certain."""
        if not is_whole and self.texts and (not text or text in self._beginnings):
            return None
        return next((stop for stop in self.texts if text.startswith(stop)), "")

    @property
    def longest(self) -> int:
        """Characters of the longest one."""
        return self._longest


@lru_cache(maxsize=1024)
def stops(*texts: str, of: frozenset[str] = frozenset()) -> Stops:
    """Stops of some texts and, beside them, of a set of them."""
    return Stops((*texts, *of))


class Lexer:
    """A text, and how far it is read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._held: int | None = None
        self._is_whole = False

    def push(self, text: str) -> None:
        """The text goes on."""
        kept = self._at if self._held is None else self._held
        self._text = self._text[kept:] + text
        self._at -= kept
        if self._held is not None:
            self._held = 0

    def end(self) -> None:
        """No more text comes."""
        self._is_whole = True

    def hold(self) -> None:
        """What is taken from here on can be given back."""
        self._held = self._at

    def release(self) -> None:
        """Nothing has to be given back."""
        self._held = None

    def rewind(self) -> None:
        """To where `hold` was said, if nothing was released since."""
        if self._held is not None:
            self._at, self._held = self._held, None

    def back(self, text: str) -> None:
        """Gives back what was taken last."""
        self._at -= len(text)

    def text_until(self, found: Stops, take: Take) -> Steps[str]:
        """Takes the text up to the first stop, and the stop, which it returns; "" where the text ends."""
        while True:
            end, stop = found.find(self._text, self._at, self._is_whole)
            self._take_to(end, take)
            if stop:
                self._take_to(end + len(stop), _nothing)
                return stop
            if self._is_whole:
                return ""
            yield

    def any_of(self, *texts: str) -> Steps[str]:
        """Takes the longest of the texts that comes next; "" and nothing taken if none does."""
        options = stops(*texts)
        while True:
            ahead = self._text[self._at : self._at + options.longest]
            found = options.at_start(ahead, self._is_whole)
            if found is not None:
                self._take_to(self._at + len(found), _nothing)
                return found
            yield

    def run(self, characters: re.Pattern[str], take: Take) -> Steps[str]:
        """Takes all that comes next of a class of characters, written `[...]*`; returns the character after
        it, "" where the text ends."""
        while True:
            match = characters.match(self._text, self._at)
            assert match is not None
            self._take_to(match.end(), take)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_whole:
                return ""
            yield

    def white_space(self, take: Take = _nothing) -> Steps[str]:
        """Takes white space; returns the character after it."""
        return (yield from self.run(_WHITE_SPACE, take))

    def characters(self, number: int, take: Take) -> Steps[None]:
        """Takes a number of characters, or what is left."""
        while len(self._text) < self._at + number and not self._is_whole:
            yield
        self._take_to(min(self._at + number, len(self._text)), take)

    def _take_to(self, end: int, take: Take) -> None:
        if end > self._at:
            piece, self._at = self._text[self._at : end], end
            if self._held is not None and end - self._held > MAX_HELD:
                raise TooLong
            take(piece)
