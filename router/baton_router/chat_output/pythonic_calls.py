"""Reads a list of Python's calls."""

import re

from baton_router.chat_output.formats import PythonicCalls
from baton_router.chat_output.json_text import to_string
from baton_router.chat_output.lexer import Lexer, Steps
from baton_router.chat_output.literals import read_literal
from baton_router.chat_output.parts import Parts

_NAME = re.compile(r"[\w.\-]*")


def read_pythonic_calls(lexer: Lexer, parts: Parts, form: PythonicCalls, begin: str) -> Steps[None]:
    """Reads what follows the mark `begin`."""
    if begin != "[":
        yield from lexer.white_space()
        if not (yield from lexer.any_of("[")):
            return
    while (yield from _read_call(lexer, parts)):
        yield from lexer.white_space()
        lexer.hold()
        if (yield from lexer.any_of(",", "]")) != ",":
            lexer.release()
            return


def _read_call(lexer: Lexer, parts: Parts) -> Steps[bool]:
    """Reads one call; false if there is none, or its end is missing."""
    yield from lexer.white_space()
    name = yield from _name(lexer)
    if not parts.may_call(name) or not (yield from lexer.any_of("(")):
        return False
    before = "{"
    while True:
        yield from lexer.white_space()
        if (yield from lexer.any_of(")")):
            if before == "{":
                parts.begin_call(name)
            parts.arguments("{}" if before == "{" else "}")
            return True
        key = yield from _name(lexer)
        yield from lexer.white_space()
        if not key or not (yield from lexer.any_of("=")):
            return False
        if before == "{":
            parts.begin_call(name)
        parts.arguments(f"{before}{to_string(key)}: ")
        before = ", "
        if not (yield from read_literal(lexer, parts.arguments)):
            return False
        if (yield from lexer.white_space()) != ")" and not (yield from lexer.any_of(",")):
            return False


def _name(lexer: Lexer) -> Steps[str]:
    pieces: list[str] = []
    yield from lexer.run(_NAME, pieces.append)
    return "".join(pieces)
