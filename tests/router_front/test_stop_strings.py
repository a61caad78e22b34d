"""Stop strings against the plain definition, whatever the pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest
from baton_router.text.stop_strings import MAX_STOP_LENGTH, StopMatcher, StopStrings


def by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut before the stop string that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


letters = st.text(alphabet="ab", max_size=30)


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(letters.filter(bool), max_size=5))
@settings(max_examples=300, deadline=None)
def test_matches_the_definition(pieces: list[str], stops: list[str]):
    matcher = StopMatcher(StopStrings(stops))
    emitted = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    assert (emitted, matcher.is_matched) == by_definition("".join(pieces), stops)


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(letters.filter(bool), max_size=5))
@settings(deadline=None)
def test_holds_back_no_more_than_it_must(pieces: list[str], stops: list[str]):
    matcher = StopMatcher(StopStrings(stops))
    seen = emitted = ""
    for piece in pieces:
        seen += piece
        emitted += matcher.push(piece)
        if matcher.is_matched:
            return
        possible = [
            size
            for size in range(len(seen) + 1)
            if any(s.startswith(seen[len(seen) - size :]) for s in stops)
        ]
        assert len(seen) - len(emitted) == max(possible, default=0)


@given(before=letters, pieces=st.lists(letters, max_size=8), stops=st.lists(letters.filter(bool), max_size=5))
@settings(max_examples=300, deadline=None)
def test_a_stop_string_may_begin_where_none_may_end(before: str, pieces: list[str], stops: list[str]):
    matcher = StopMatcher(StopStrings(stops))
    emitted = matcher.push(before, may_match=False)
    emitted += "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    text, expected = before + "".join(pieces), (before + "".join(pieces), False)
    for end in range(len(before) + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            expected = (text[: end - max(map(len, ending))], True)
            break
    assert (emitted, matcher.is_matched) == expected


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("<e>", "one"), ("ne<e>", "o"), ("<e>\n", "one"), ("<e>x", "one\ntwo"), ("etw", "one\ntwo")],
)
def test_hidden_pieces_are_read_and_not_emitted(stop: str, expected: str):
    matcher = StopMatcher(StopStrings([stop]))
    pieces = [("one", False), ("<e>", True), ("\ntwo", False)]
    emitted = "".join(matcher.push(piece, is_hidden=is_hidden) for piece, is_hidden in pieces)
    assert emitted + matcher.flush() == expected
    assert matcher.is_matched == (expected != "one\ntwo")


def test_stop_string_over_three_pieces():
    matcher = StopMatcher(StopStrings(["END"]))
    assert [matcher.push(piece) for piece in ("the E", "N", "D of it", "more")] == ["the ", "", "", ""]
    assert matcher.is_matched


def test_false_start_is_given_back():
    matcher = StopMatcher(StopStrings(["END"]))
    assert [matcher.push("EN"), matcher.push("EMY"), matcher.flush()] == ["", "ENEMY", ""]


@pytest.mark.parametrize("stops", [["x"] * 17, [""], ["x" * (MAX_STOP_LENGTH + 1)]])
def test_bad_lists_are_refused(stops: list[str]):
    with pytest.raises(InvalidRequest) as caught:
        StopStrings(stops)
    assert caught.value.param == "stop"
