"""Formats of arguments that are no JSON object: between tags, and as Python's named arguments.

Tags: the properties stand in the schema's order, those that are not required or not at all. What may be a
string, or has no type, is text as it is, of which only `enum` and `const` are kept to, and no `pattern` or
length. Any other value is JSON. What a schema says beside its properties, such as `anyOf`, can't be kept to:
then arguments are any text between tags, and only names of tools are kept to.

Named arguments: those that are required come first, in the schema's order; others may come in any order.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from baton.grammars import formats
from baton.grammars.formats import Format
from baton_router.chat_output.formats import TaggedCalls
from baton_router.chat_output.values import types_of

# Of a schema those keywords that properties' formats keep to, or that say nothing of what is valid.
_KEPT = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
    | {"title", "description", "default", "examples", "$comment"}
)
_DEFINITIONS = ("$defs", "definitions")
_KEYWORD = re.compile(r"[\w.\-]+")
_TAGGED_KEY = re.compile(r"[^<>\s]+")
_NOTHING: Format = {"type": "const_string", "value": ""}
_ANY_KEYWORD: Format = {
    "type": "tag",
    "begin": "",
    "content": {
        "type": "sequence",
        "elements": [
            {"type": "regex", "pattern": "[A-Za-z_][A-Za-z0-9_]{0,63}="},
            {**formats.json_schema(True), "is_compact": True},
        ],
    },
    "end": "",
}


def tagged_arguments(form: TaggedCalls, schema: Mapping[str, Any]) -> Format:
    """Each argument between its tags."""
    properties = _properties(schema)
    if not schema.keys() <= _KEPT or not all(map(_TAGGED_KEY.fullmatch, properties)):
        return _any_tagged(form)
    required = _required(schema)
    arguments: list[Format] = []
    for name, part in properties.items():
        argument: Format = {
            "type": "tag",
            "begin": f"{form.key_begin}{name}{_between(form)}",
            "content": _tagged_value(form, part, schema),
            "end": _value_end(form),
        }
        arguments.append(argument if name in required else {"type": "or", "elements": [argument, _NOTHING]})
    if not arguments and "properties" not in schema:
        return _any_tagged(form)
    return {"type": "sequence", "elements": arguments or [_NOTHING]}


def keyword_arguments(schema: Mapping[str, Any]) -> Format:
    """Each argument as its name, `=` and JSON."""
    properties = _properties(schema)
    if not schema.keys() <= _KEPT or not all(map(_KEYWORD.fullmatch, properties)):
        return _keywords([_ANY_KEYWORD])
    required = _required(schema)
    first: list[Format] = []
    for name in required:
        begin = f"{', ' if first else ''}{name}="
        first += [{"type": "const_string", "value": begin}, _json(properties[name], schema)]
    others = [
        _tag(f"{name}=", _json(part, schema)) for name, part in properties.items() if name not in required
    ]
    if not properties and "properties" not in schema:
        return _keywords([_ANY_KEYWORD])
    if not others:
        return {"type": "sequence", "elements": first or [_NOTHING]}
    if not first:
        return _keywords(others)
    rest = _tag(", ", {**_keywords(others), "at_least_one": True})
    return {"type": "sequence", "elements": [*first, {"type": "or", "elements": [rest, _NOTHING]}]}


def _any_tagged(form: TaggedCalls) -> Format:
    """Any arguments between tags."""
    value: Format = {"type": "tag", "begin": _between(form), "content": _text(form), "end": _value_end(form)}
    key: Format = {"type": "regex", "pattern": "[A-Za-z0-9_.-]{1,64}"}
    argument = _tag(form.key_begin, {"type": "sequence", "elements": [key, value]})
    return {"type": "tags_with_separator", "tags": [argument], "separator": ""}


def _between(form: TaggedCalls) -> str:
    """What stands between a key and its value."""
    return f"{form.key_end}\n{form.value_begin}"


def _value_end(form: TaggedCalls) -> str:
    """What stands behind a value; the first of its ends is what is written."""
    return form.value_ends[0] + form.after_value


def _text(form: TaggedCalls) -> Format:
    """Any text in which no value ends."""
    return {"type": "any_text", "excludes": list(form.value_ends)}


def _tagged_value(form: TaggedCalls, part: Any, schema: Mapping[str, Any]) -> Format:
    types = types_of(part, schema)
    if types and "string" not in types:
        return _json(part, schema)
    texts = list(_texts(part))
    return formats.choice(texts) if texts else _text(form)


def _keywords(tags: list[Format]) -> Format:
    return {"type": "tags_with_separator", "tags": tags, "separator": ", "}


def _tag(begin: str, content: Format) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": ""}


def _texts(part: Any) -> Iterator[str]:
    """What a value can be written as, if the schema lists its values."""
    values = part.get("enum", [part["const"]] if "const" in part else []) if isinstance(part, Mapping) else []
    for value in values if isinstance(values, list) else []:
        yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(part: Any, schema: Mapping[str, Any]) -> Format:
    """A value in JSON on one line; it may refer to what the whole schema defines."""
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    whole = {**part, **definitions} if isinstance(part, Mapping) else part
    return {**formats.json_schema(whole), "is_compact": True}


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those that the schema describes, and those that it only requires."""
    described = schema.get("properties")
    properties = dict(described) if isinstance(described, Mapping) else {}
    return properties | {name: True for name in _required(schema) if name not in properties}


def _required(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
