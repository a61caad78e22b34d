"""Reads calls whose arguments stand between tags."""

from collections.abc import Mapping
from typing import Any

from baton_router.chat_output.formats import TaggedCalls
from baton_router.chat_output.json_text import escaped, json_value, to_string
from baton_router.chat_output.lexer import Lexer, Steps, stops
from baton_router.chat_output.parts import Parts
from baton_router.chat_output.values import STRING, to_json, types_of


def read_tagged_call(lexer: Lexer, parts: Parts, form: TaggedCalls, begin: str) -> Steps[None]:
    """Reads what follows the mark `begin`."""
    if begin != form.before_name:
        yield from lexer.white_space()
        if form.before_name and not (yield from lexer.any_of(form.before_name)):
            return
    name: list[str] = []
    end = yield from lexer.text_until(stops(*form.name_ends, *form.begins), name.append)
    if end not in form.name_ends or not parts.may_call("".join(name).strip()):
        return
    if end in (form.key_begin, *form.ends):
        lexer.back(end)
    parts.begin_call("".join(name).strip())
    yield from _read_arguments(lexer, parts, form)


def _read_arguments(lexer: Lexer, parts: Parts, form: TaggedCalls) -> Steps[None]:
    parts.arguments("{")
    before = ""
    while True:
        yield from lexer.white_space()
        mark = yield from lexer.text_until(stops(form.key_begin, *form.ends), parts.content)
        if mark != form.key_begin:
            if mark:
                parts.arguments("}")
                parts.mark()
            return
        parts.mark()
        key: list[str] = []
        if not (yield from lexer.text_until(stops(form.key_end), key.append)):
            return
        parts.arguments(f"{before}{to_string(''.join(key).strip())}: ")
        before = ", "
        yield from lexer.white_space() if form.value_begin else _no_steps()
        yield from lexer.any_of(form.value_begin)
        yield from _read_value(lexer, parts, form, _types(parts.schema(), "".join(key).strip()))


def _read_value(lexer: Lexer, parts: Parts, form: TaggedCalls, types: tuple[str, ...]) -> Steps[None]:
    yield from lexer.any_of(form.line)
    ends = stops(*form.value_ends)
    if types == STRING:
        parts.arguments('"')
        end = yield from lexer.text_until(ends, lambda piece: parts.arguments(escaped(piece)))
        if end:
            parts.arguments('"')
    else:
        value: list[str] = []
        if (yield from lexer.white_space(value.append)) in ("{", "["):  # within strings an end is none
            yield from json_value(lexer, value.append)
        end = yield from lexer.text_until(ends, value.append)
        text = "".join(value)
        if end and not end.startswith("\n"):
            text = text.removesuffix(form.line)
        parts.arguments(to_json(text, types) if end else text)
    if end and not _closes_value(end, form):
        lexer.back(end)


def _closes_value(end: str, form: TaggedCalls) -> bool:
    """Whether the end is the value's own, and not what comes after a value whose end was left out."""
    return form.key_begin not in end and not any(mark in end for mark in form.ends)


def _types(schema: Mapping[str, Any], key: str) -> tuple[str, ...]:
    properties = schema.get("properties")
    return types_of(properties.get(key) if isinstance(properties, Mapping) else None, schema)


def _no_steps() -> Steps[None]:
    yield from ()
