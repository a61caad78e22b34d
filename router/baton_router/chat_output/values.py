"""Values that models write as bare text, such as those between tags, become JSON by their schema."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from baton_router.chat_output.json_text import to_string
from baton_router.chat_output.literals import literal_to_json

_INTEGER = re.compile(r"-?(0|[1-9]\d*)(\.0+)?")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_CONTAINERS = {"object": dict, "array": list}
_MAX_REFERENCES = 16  # each leads to the next

STRING = ("string",)


def types_of(schema: Any, root: Mapping[str, Any]) -> tuple[str, ...]:
    """The types that a schema names, in its order; empty if it names none. `root` holds its definitions."""
    return tuple(dict.fromkeys(_types(schema, root, _MAX_REFERENCES)))


def to_json(text: str, types: tuple[str, ...]) -> str:
    """A value in JSON: of the first type that it fits, else a string. Without types, JSON stays JSON."""
    bare = text.strip()
    if bare.lower() in ("null", "none") and ("null" in types or "string" not in types):
        return "null"
    if not types:
        return to_string(text) if _parsed(bare) is None else bare
    for kind in types:
        if kind == "string":
            break
        if (found := _as(kind, bare)) is not None:
            return found
    return to_string(text)


def _types(schema: Any, root: Mapping[str, Any], num_references: int) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    kind = schema.get("type")
    if isinstance(kind, str):
        yield kind
        return
    if isinstance(kind, list):
        yield from (entry for entry in kind if isinstance(entry, str))
        return
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        yield from map(_type_of, values)
    for keyword in ("anyOf", "oneOf", "allOf"):
        for option in schema[keyword] if isinstance(schema.get(keyword), list) else ():
            yield from _types(option, root, num_references - 1)
    if isinstance(schema.get("$ref"), str) and num_references > 0:
        yield from _types(_referred(schema["$ref"], root), root, num_references - 1)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    part: Any = root
    for key in reference.removeprefix("#").strip("/").split("/"):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _as(kind: str, text: str) -> str | None:
    """The text as JSON of a type; None if it is no such value."""
    match kind:
        case "integer":
            return text if _INTEGER.fullmatch(text) else None
        case "number":
            return text if _NUMBER.fullmatch(text) else None
        case "boolean":
            return text.lower() if text.lower() in ("true", "false") else None
        case "object" | "array":
            return _as_container(_CONTAINERS[kind], text)
    return None


def _as_container(kind: type, text: str) -> str | None:
    if isinstance(_parsed(text), kind):
        return text
    written = literal_to_json(text)  # the models were trained on Python's notation too
    return written if written is not None and isinstance(_parsed(written), kind) else None


def _parsed(text: str) -> Any:
    """The value; None where the text is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
