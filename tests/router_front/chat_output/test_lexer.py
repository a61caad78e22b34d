"""The lexer against plain definitions, whatever the pieces."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_router.chat_output.lexer import MAX_HELD, Lexer, Steps, TooLong, stops

pieces_of_text = st.lists(st.text(alphabet="ab", max_size=6), max_size=8)
some_stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4)


def run(steps: Steps[object], lexer: Lexer, pieces: Sequence[str]) -> None:
    for piece in pieces:
        lexer.push(piece)
        next(steps, None)
    lexer.end()
    next(steps, None)


@given(pieces=pieces_of_text, texts=some_stops)
@settings(max_examples=300, deadline=None)
def test_text_is_cut_at_the_first_stop_and_the_longest_there(pieces: list[str], texts: list[str]):
    lexer, found = Lexer(), []

    def read() -> Steps[None]:
        taken: list[str] = []
        while stop := (yield from lexer.text_until(stops(*texts), taken.append)):
            found.append(("".join(taken), stop))
            taken.clear()
        found.append(("".join(taken), ""))

    run(read(), lexer, pieces)
    parts = re.split("(" + "|".join(sorted(texts, key=len, reverse=True)) + ")", "".join(pieces))
    assert found == list(zip(parts[::2], [*parts[1::2], ""], strict=True))


@given(pieces=pieces_of_text, texts=some_stops)
@settings(max_examples=200, deadline=None)
def test_the_longest_that_comes_next_is_taken(pieces: list[str], texts: list[str]):
    lexer, found = Lexer(), []

    def read() -> Steps[None]:
        found.append((yield from lexer.any_of(*texts)))

    run(read(), lexer, pieces)
    whole = "".join(pieces)
    assert found == [max((text for text in texts if whole.startswith(text)), key=len, default="")]


def test_text_is_passed_on_as_soon_as_it_is_certain():
    lexer, taken = Lexer(), []
    steps = lexer.text_until(stops("<end>"), taken.append)
    for piece, certain in (("one <", "one "), ("em>", "<em>"), ("two<en", "two"), ("d", "")):
        taken.clear()
        lexer.push(piece)
        next(steps, None)
        assert "".join(taken) == certain


def test_what_is_held_can_be_read_again():
    lexer, taken = Lexer(), []

    def read() -> Steps[None]:
        lexer.hold()
        yield from lexer.text_until(stops("."), taken.append)
        lexer.rewind()
        yield from lexer.text_until(stops(), taken.append)

    run(read(), lexer, ["a", "b", ".c"])
    assert "".join(taken) == "abab.c"


@pytest.mark.parametrize("size", [1, 1000, 2 * MAX_HELD])
def test_no_more_is_held_than_is_allowed(size: int):
    lexer = Lexer()

    def read(length: int) -> Steps[None]:
        lexer.hold()
        yield from lexer.characters(length, lambda _: None)

    text = "x" * 2 * MAX_HELD
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    run(read(MAX_HELD), lexer, pieces)
    lexer = Lexer()
    with pytest.raises(TooLong):
        run(read(MAX_HELD + 1), lexer, pieces)
