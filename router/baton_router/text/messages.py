"""Messages as clients send them become messages as a chat template takes them; the same for both doors.

A template sees every field that the client gave. Four things are made to fit: contents (a string or a list of
parts, see content_format.py), the role `developer`, the two names of reasoning, and arguments of tool calls,
which OpenAI's API writes as JSON text and templates read as an object.
"""

import json
from collections.abc import Mapping
from typing import Any

from baton.core.errors import InvalidRequest
from baton_router.text.content_format import ContentFormat

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_REASONING = ("reasoning_content", "reasoning")  # one thing: vLLM's and others' name, and the newer one

Message = Mapping[str, Any]


def message_for_template(
    message: Message, form: ContentFormat, *, where: str, knows_developers: bool
) -> dict[str, Any]:
    """A message with every field that is not null; `where` is its name for the client, such as messages[0].

    Raises InvalidRequest for an unknown role, a content that is not text, and tool calls that are none.
    """
    fields = {name: value for name, value in message.items() if value is not None}
    fields["role"] = _role(message.get("role"), f"{where}.role", knows_developers)
    fields["content"] = _content(message.get("content"), form, f"{where}.content")
    reasoning = next((fields[name] for name in _REASONING if name in fields), None)
    if reasoning is not None:
        fields = dict.fromkeys(_REASONING, reasoning) | fields
    # An empty list asks for nothing, but templates ask whether the field is there.
    if calls := fields.pop("tool_calls", None):
        fields["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return fields


def _role(role: Any, where: str, knows_developers: bool) -> str:
    if role not in ROLES:
        raise InvalidRequest(
            f"{where} is {role!r}; there are {', '.join(ROLES)}.", param=where, code="unknown_role"
        )
    return "system" if role == "developer" and not knows_developers else str(role)


def _content(content: Any, form: ContentFormat, where: str) -> str | list[dict[str, str]] | None:
    """Text parts that become one string are joined by line breaks."""
    if content is None and form.takes_null:
        return None
    if content is None or isinstance(content, str):
        if form.takes_strings:
            return content or ""
        return [] if content is None else [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of text parts.", param=where)
    texts = [_part_text(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if form.takes_parts:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise InvalidRequest(
            f"{where} is of type {kind!r}, but this server takes text alone: parts of type 'text'.",
            param=where,
            code="unsupported_content",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text must be a string.", param=f"{where}.text")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where} must be a list.", param=where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} must have a function with a name.", param=f"{where}.function")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(arguments: Any) -> Any:
    """The object that JSON text stands for; what a model wrote that is none stays as it is."""
    if arguments is None or arguments == "":
        return {}
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
