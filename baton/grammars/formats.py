"""The language in which a request says what its answer has to look like.

It is the language of structural tags, which is xgrammar's (https://xgrammar.mlc.ai/docs) and known to clients
of vLLM: a JSON object with a `type`. A schema, a regex or a grammar is one; sequences, choices and tags are
made of others, so that a chat's thinking, its tool calls and its JSON are one format. A request carries it as
text, and each backend makes a grammar of its own from it.

A format of Baton's own may stand around the whole: `thinking_budget`, see thinking.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.fields import FormatText
from baton.core.sampling import MAX_FORMAT_LENGTH

MAX_DEPTH = 64  # of objects and lists within each other, a schema's included
FIELD = "structured_outputs"

Format = Mapping[str, Any]
THINKING_BUDGET = "thinking_budget"

# What each type of format holds, and how that is checked: see _check_value.
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "json_schema": {"json_schema": "schema", "is_compact?": "flag"},
    "regex": {"pattern": "string"},
    "grammar": {"grammar": "string"},
    "const_string": {"value": "string"},
    "any_text": {"excludes?": "strings"},
    "sequence": {"elements": "formats"},
    "or": {"elements": "formats"},
    "tag": {"begin": "string", "content": "format", "end": "ends"},
    "triggered_tags": {
        **{"triggers": "strings", "tags": "tags", "at_least_one?": "flag", "stop_after_first?": "flag"},
        "excludes?": "strings",
    },
    "tags_with_separator": {
        **{"tags": "tags", "separator": "string", "at_least_one?": "flag", "stop_after_first?": "flag"},
    },
}


_BUDGET_FIELDS = {"begins": "strings", "ends": "ends", "max_tokens": "count", "is_open": "flag"}


def json_schema(schema: Mapping[str, Any] | bool) -> Format:
    """JSON that a schema describes."""
    return {"type": "json_schema", "json_schema": schema}


def json_object() -> Format:
    """Any JSON object."""
    return json_schema({"type": "object"})


def choice(texts: Sequence[str]) -> Format:
    """One of some texts."""
    return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}


def thinking_budget(
    begins: Sequence[str], ends: Sequence[str], max_tokens: int, *, is_open: bool, content: Format | None
) -> Format:
    """At most `max_tokens` between the marks of thinking; of those that end it the first is the one that is
    written. `is_open`: the prompt ends within thinking. `content`: the whole answer's; None: any text."""
    return {
        "type": THINKING_BUDGET,
        "begins": list(begins),
        "ends": list(ends),
        "max_tokens": max_tokens,
        "is_open": is_open,
        "content": content,
    }


def content_of(form: Format) -> Format | None:
    """What a backend makes a grammar of: the format less what stands around it."""
    content: Format | None = form["content"] if form["type"] == THINKING_BUDGET else form
    return content


def says_where_it_ends(text: FormatText) -> bool:
    """Whether not any text is an answer."""
    return content_of(json.loads(text)) is not None


def to_text(form: Format, field: str = FIELD) -> FormatText:
    """A format as requests carry it. Raises InvalidRequest, which says where it is no format."""
    check_depth(form, field)
    _check_whole(form, field)
    text = json.dumps(form, ensure_ascii=False, separators=(",", ":"))
    if len(text) > MAX_FORMAT_LENGTH:
        raise _wrong(field, f"{field} has {len(text)} characters; at most {MAX_FORMAT_LENGTH} are allowed.")
    return FormatText(text)


def from_text(text: str) -> Format:
    """Raises InvalidRequest where the text is no format."""
    try:
        form = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(FIELD, f"{FIELD} is not valid JSON: {error}") from error
    check_depth(form, FIELD)
    _check_whole(form, FIELD)
    checked: Format = form
    return checked


def check_depth(value: Any, field: str) -> None:
    """Raises InvalidRequest where objects and lists lie deeper within each other than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise _wrong(field, f"{field} is nested more than {MAX_DEPTH} levels deep.")


def _check_whole(form: Any, where: str) -> None:
    if not isinstance(form, Mapping) or form.get("type") != THINKING_BUDGET:
        _check(form, where)
        return
    for name, rule in _BUDGET_FIELDS.items():
        _CHECKS[rule](form.get(name), f"{where}.{name}")
    if form.get("content") is not None:
        _check(form["content"], f"{where}.content")


def _check(form: Any, where: str) -> None:
    if not isinstance(form, Mapping):
        raise _wrong(where, f"{where} must be an object with a type.")
    kind = form.get("type")
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None:
        raise _wrong(where, f"{where} has the type {kind!r}; there are {', '.join(_FIELDS)}.")
    for name, rule in fields.items():
        key = name.removesuffix("?")
        if form.get(key) is None and name.endswith("?"):
            continue
        if key not in form:
            raise _wrong(where, f"{where} of the type '{kind}' needs {key}.")
        _CHECKS[rule](form[key], f"{where}.{key}")
    if kind == "triggered_tags":
        _check_triggers(form, where)


def _check_triggers(form: Format, where: str) -> None:
    for index, tag in enumerate(form["tags"]):
        if not any(tag["begin"].startswith(trigger) for trigger in form["triggers"]):
            at = f"{where}.tags[{index}].begin"
            raise _wrong(at, f"{at} begins with none of the triggers.")


def _check_string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _wrong(where, f"{where} must be a string.")


def _check_strings(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise _wrong(where, f"{where} must be a list of strings that are not empty.")


def _check_ends(value: Any, where: str) -> None:
    ends = [value] if isinstance(value, str) else value
    if not isinstance(ends, list) or not ends or not all(isinstance(end, str) for end in ends):
        raise _wrong(where, f"{where} must be a string or a list of them.")


def _check_count(value: Any, where: str) -> None:
    if type(value) is not int or value < 0:
        raise _wrong(where, f"{where} must be a whole number, at least 0.")


def _check_flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise _wrong(where, f"{where} must be true or false.")


def _check_schema(value: Any, where: str) -> None:
    if not isinstance(value, Mapping | bool):
        raise _wrong(where, f"{where} must be a JSON schema: an object, true or false.")


def _check_formats(value: Any, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong(where, f"{where} must be a list that is not empty.")
    for index, form in enumerate(value):
        _check(form, f"{where}[{index}]")


def _check_tags(value: Any, where: str) -> None:
    _check_formats(value, where)
    for index, form in enumerate(value):
        if form["type"] != "tag":
            raise _wrong(f"{where}[{index}]", f"{where}[{index}] must have the type 'tag'.")


_CHECKS: Mapping[str, Callable[[Any, str], None]] = {
    "string": _check_string,
    "strings": _check_strings,
    "ends": _check_ends,
    "count": _check_count,
    "flag": _check_flag,
    "schema": _check_schema,
    "format": _check,
    "formats": _check_formats,
    "tags": _check_tags,
}


def _wrong(where: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=where, code="invalid_format")
