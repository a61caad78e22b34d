"""What clients say of the form of an answer, as OpenAI's and vLLM's clients say it, becomes one format."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.fields import FormatText
from baton.grammars import formats
from baton.grammars.compiler import GUIDANCE
from baton.grammars.formats import FIELD, Format
from baton.grammars.guidance import check

MAX_CHOICES = 10_000
_MAX_CHECKED = 1024  # formats that are known to be fine

# Of vLLM's fields those that ask for nothing more, with the values that do so.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "disable_fallback": (None, True, False),
    "disable_additional_properties": (None, False),
    "whitespace_pattern": (None,),
}


def from_structured_outputs(value: Mapping[str, Any]) -> FormatText | None:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar, json_object and structural_tag.

    Raises InvalidRequest, with the field in `param`.
    """
    given = {key: entry for key, entry in value.items() if entry is not None and entry is not False}
    is_compact = given.pop("disable_any_whitespace", False)
    for key, neutral in _NEUTRAL.items():
        if given.pop(key, None) not in neutral:
            raise _wrong(f"{FIELD}.{key}", f"{FIELD}.{key} is not supported.")
    if not given:
        return None
    if len(given) > 1:
        raise _wrong(FIELD, f"{FIELD} takes one of its fields, but has {', '.join(sorted(given))}.")
    [(key, entry)] = given.items()
    if key not in _KINDS:
        raise _wrong(f"{FIELD}.{key}", f"{FIELD} has no field '{key}'; there are {', '.join(_KINDS)}.")
    form = _KINDS[key](entry, f"{FIELD}.{key}")
    if is_compact and form["type"] == "json_schema":
        form = {**form, "is_compact": True}
    return formats.to_text(form, f"{FIELD}.{key}")


def from_response_format(value: Mapping[str, Any]) -> FormatText | None:
    """OpenAI's `response_format`; None for text. Raises InvalidRequest, with the field in `param`."""
    field = "response_format"
    match value.get("type"):
        case "text":
            return None
        case "json_object" if value.get("schema") is not None:  # as llama.cpp and others have it
            field = f"{field}.schema"
            form = _json(value["schema"], field)
        case "json_object":
            form = formats.json_object()
        case "json_schema":
            named = value.get("json_schema")
            if not isinstance(named, Mapping) or "schema" not in named:
                raise _wrong(f"{field}.json_schema", f"{field}.json_schema must hold a name and a schema.")
            field = f"{field}.json_schema.schema"
            form = _json(named["schema"], field)
        case "structural_tag":
            form = _structural_tag(value, field)
        case kind:
            raise _wrong(
                f"{field}.type",
                f"{field}.type is {kind!r}; there are text, json_object, json_schema and structural_tag.",
            )
    return formats.to_text(form, field)


class FormatChecks:
    """Knows which formats can become grammars, so that a client hears at once of one that can't."""

    def __init__(self, backend: str) -> None:
        """`backend`: the library that the workers are to use, or auto (baton/grammars/compiler.py)."""
        self._backend = GUIDANCE if backend == "auto" else backend
        self._fine: OrderedDict[str, None] = OrderedDict()

    async def checked(self, text: FormatText, field: str) -> FormatText:
        """The format as workers get it. Raises InvalidRequest, which says where it can't be kept, with the
        client's name for it, `field`, in `param`."""
        if self._backend != GUIDANCE:  # it needs torch: the workers find out
            return FormatText(json.dumps({**json.loads(text), "backend": self._backend}))
        if text not in self._fine:
            if (content := formats.content_of(formats.from_text(text))) is not None:
                await self._check(content, field)
            self._fine[text] = None
            while len(self._fine) > _MAX_CHECKED:
                self._fine.popitem(last=False)
        self._fine.move_to_end(text)
        return text

    async def _check(self, form: Format, field: str) -> None:
        try:
            await asyncio.to_thread(check, form)  # finding the faulty part takes up to a second
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param=field, code=error.code) from None


def _json(value: Any, where: str) -> Format:
    """A schema, which vLLM's clients may send as text."""
    if isinstance(value, str):
        value = _parsed(value, where)
    return formats.json_schema(value)


def _json_object(value: Any, where: str) -> Format:
    if value is not True:
        raise _wrong(where, f"{where} must be true or false.")
    return formats.json_object()


def _regex(value: Any, where: str) -> Format:
    return {"type": "regex", "pattern": value}


def _grammar(value: Any, where: str) -> Format:
    return {"type": "grammar", "grammar": value}


def _choice(value: Any, where: str) -> Format:
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_CHOICES
    if not is_list or not all(isinstance(text, str) and text for text in value):
        raise _wrong(where, f"{where} must be a list of 1 to {MAX_CHOICES} texts that are not empty.")
    return formats.choice(value)


def _structural_tag(value: Any, where: str) -> Format:
    """A format of its own, or tags that triggers begin, as structural tags were at first; vLLM's clients may
    send it as text."""
    if isinstance(value, str):
        value = _parsed(value, where)
    if not isinstance(value, Mapping):
        raise _wrong(where, f"{where} must be an object.")
    if isinstance(value.get("format"), Mapping):
        form: Format = value["format"]
        return form
    structures = value.get("structures")
    if not isinstance(structures, list) or not all(isinstance(entry, Mapping) for entry in structures):
        raise _wrong(where, f"{where} must have a format, or structures and triggers.")
    tags = [
        {
            "type": "tag",
            "begin": entry.get("begin"),
            "content": {"type": "json_schema", "json_schema": entry.get("schema", True)},
            "end": entry.get("end"),
        }
        for entry in structures
    ]
    return {"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags}


_KINDS: Mapping[str, Callable[[Any, str], Format]] = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, f"{where} is not valid JSON: {error}") from error


def _wrong(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_format")
