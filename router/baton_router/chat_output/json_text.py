"""JSON as models write it: where a value ends, found as it comes, and texts as JSON.

Only strings, brackets and the characters between them are looked at. A value of which that much is right is
passed on as the model wrote it, whatever else is wrong with it.
"""

import json
import re

from baton_router.chat_output.lexer import Lexer, Steps, Take

_BETWEEN = re.compile(r"[\s\w+\-.,:]*")
_IN_STRING = re.compile(r'[^"\\]*')
_WORD = re.compile(r"[\w+\-.]*")


def json_value(lexer: Lexer, take: Take) -> Steps[bool]:
    """Takes one value; false where it breaks off, with all taken that came before that."""
    first = yield from lexer.white_space()
    if first == '"':
        return (yield from json_string(lexer, take))
    if first not in ("{", "["):
        yield from lexer.run(_WORD, take)
        return bool(first) and _WORD.fullmatch(first) is not None
    depth = 0
    while True:
        character = yield from lexer.run(_BETWEEN, take)
        if character == '"':
            if not (yield from json_string(lexer, take)):
                return False
        elif character in ("{", "[", "}", "]"):
            yield from lexer.characters(1, take)
            depth += 1 if character in ("{", "[") else -1
            if not depth:
                return True
        else:
            return False


def json_string(lexer: Lexer, take: Take) -> Steps[bool]:
    """Takes one string with its quotes; false where there is none, or the text ends in it."""
    if not (yield from lexer.any_of('"')):
        return False
    take('"')
    while True:
        character = yield from lexer.run(_IN_STRING, take)
        yield from lexer.characters(2 if character == "\\" else 1, take)
        if character in ("", '"'):
            return bool(character)


def string_value(lexer: Lexer) -> Steps[str | None]:
    """The text of the string that comes next; None if there is no valid one."""
    yield from lexer.white_space()
    pieces: list[str] = []
    if not (yield from json_string(lexer, pieces.append)):
        return None
    return text_of("".join(pieces))


def text_of(string: str) -> str | None:
    """The text of a JSON string; None if it is broken, or no text can hold it."""
    try:
        text = json.loads(string, strict=False)
        text.encode()
    except ValueError:
        return None
    return str(text)


def to_string(text: str) -> str:
    """A text as a JSON string."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False)


def escaped(piece: str) -> str:
    """A piece of a text as a piece of a JSON string."""
    return json.dumps(piece, ensure_ascii=False)[1:-1]
