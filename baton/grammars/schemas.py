"""JSON schemas: what is taken out of them before they become grammars, and where one can't."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Keywords of all drafts whose value is a schema, a list of schemas, or schemas by name.
_SCHEMA = ("additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames")
_SCHEMA_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")
# Which the grammars enforce. Another `format` says nothing of what is valid: JSON Schema has it as a note.
_ENFORCED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
_MAX_TRIED = 500  # parts of a broken schema


def without_notes(schema: Any) -> Any:
    """The schema without formats that say nothing of what is valid."""
    if not isinstance(schema, Mapping):
        return schema
    kept = dict(schema)
    if isinstance(kept.get("format"), str) and kept["format"] not in _ENFORCED_FORMATS:
        del kept["format"]
    for key, name, inner in _parts(schema):
        if name is None:
            kept[key] = without_notes(inner)
            continue
        if kept[key] is schema[key]:
            kept[key] = schema[key].copy()
        kept[key][name] = without_notes(inner)
    return kept


def faulty_part(schema: Any, is_fine: Callable[[Any], bool]) -> tuple[str, Any]:
    """Where a schema that is not fine goes wrong: the path of its deepest part that is not, and the part.

    A part is tried with the definitions of the whole, since it may refer to them. After some hundreds the
    search ends with what it has found.
    """
    definitions = {key: schema[key] for key in _DEFINITIONS if isinstance(schema, Mapping) and key in schema}
    num_tried = 0

    def is_faulty(part: Any) -> bool:
        nonlocal num_tried
        num_tried += 1
        tried = {**part, **definitions} if isinstance(part, Mapping) else part
        return num_tried <= _MAX_TRIED and not is_fine(tried)

    path, part = "", schema
    while True:
        for key, name, inner in _parts(part):
            if is_faulty(inner):
                path += f".{key}" if name is None else f".{key}[{name!r}]"
                part = inner
                break
        else:
            return path.removeprefix("."), part


def _parts(schema: Any) -> Iterator[tuple[str, Any, Any]]:
    """The schemas right within one: keyword, name or index if there are several, and the schema."""
    if not isinstance(schema, Mapping):
        return
    for key in schema:
        value = schema[key]
        if key in _SCHEMA and isinstance(value, Mapping):
            yield key, None, value
        elif (key in _SCHEMA_LIST or key == "items") and isinstance(value, list):
            for index, inner in enumerate(value):
                yield key, index, inner
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            for name, inner in value.items():
                yield key, name, inner
