"""Reads calls whose name stands in front of their arguments."""

from baton_router.chat_output.formats import NamedCalls
from baton_router.chat_output.json_calls import read_list, read_object, read_rest
from baton_router.chat_output.json_text import json_value
from baton_router.chat_output.lexer import Lexer, Steps, stops
from baton_router.chat_output.parts import Parts


def read_named_call(lexer: Lexer, parts: Parts, form: NamedCalls, begin: str) -> Steps[None]:
    """Reads what follows the mark `begin`."""
    yield from lexer.white_space()
    bracket = yield from lexer.any_of("[", "{")
    if bracket == "[":
        yield from read_list(lexer, parts, form)
    elif bracket == "{":
        yield from read_object(lexer, parts, form)
    else:
        yield from _read_name_and_arguments(lexer, parts, form)


def _read_name_and_arguments(lexer: Lexer, parts: Parts, form: NamedCalls) -> Steps[None]:
    yield from lexer.any_of(form.before_name)
    name: list[str] = []
    end = yield from lexer.text_until(stops(*form.name_ends, *form.ends, *form.begins), name.append)
    if end not in form.name_ends or not parts.may_call("".join(name).strip()):
        return
    if end == "[CALL_ID]":
        end = yield from lexer.text_until(stops("[ARGS]", "{"), _nothing)
    if end == "{":
        lexer.back(end)
    parts.begin_call("".join(name).strip())
    yield from _read_arguments(lexer, parts, form)


def _read_arguments(lexer: Lexer, parts: Parts, form: NamedCalls) -> Steps[None]:
    yield from lexer.white_space()
    yield from lexer.any_of(*form.before_arguments)
    first = yield from lexer.white_space()
    if first != "{" or not (yield from json_value(lexer, parts.arguments)):
        yield from read_rest(lexer, parts, form)
        return
    if form.after_arguments:
        yield from lexer.white_space()
        yield from lexer.any_of(*form.after_arguments)


def _nothing(_: str) -> None:
    pass
