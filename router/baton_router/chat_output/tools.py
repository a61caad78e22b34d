"""What a request says of tools, checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from baton.core.errors import InvalidRequest
from baton.grammars.formats import check_depth

MAX_TOOLS = 512
_NAME = re.compile(r"[a-zA-Z0-9_.\-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]  # a JSON schema of an object
    strict: bool = False  # calls have to keep to the schema


class ToolMode(Enum):
    """Whether the model calls tools."""

    NONE = "none"
    AUTO = "auto"  # if it likes
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the client wants of the model. `name`: it has to call this tool, once."""

    mode: ToolMode
    name: str | None = None


def read_tools(value: Any) -> tuple[Tool, ...]:
    """OpenAI's `tools`; none for null and an empty list. Raises InvalidRequest, with the field in `param`."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _wrong("tools", "tools must be a list.")
    if len(value) > MAX_TOOLS:
        raise _wrong("tools", f"tools holds {len(value)} tools, but at most {MAX_TOOLS} are allowed.")
    tools: dict[str, Tool] = {}
    for index, entry in enumerate(value):
        where = f"tools[{index}]"
        tool = _read_tool(entry, where)
        if tool.name in tools:
            where = f"{where}.function.name"
            raise _wrong(where, f"{where} is '{tool.name}', which is the name of another tool already.")
        tools[tool.name] = tool
    return tuple(tools.values())


def read_tool_choice(value: Any, tools: Sequence[Tool]) -> ToolChoice:
    """OpenAI's `tool_choice`; without one the model may call what tools there are.

    Raises InvalidRequest, with the field in `param`.
    """
    if value is None:
        return ToolChoice(ToolMode.AUTO if tools else ToolMode.NONE)
    if value == ToolMode.NONE.value:
        return ToolChoice(ToolMode.NONE)
    if not tools:
        raise _wrong("tool_choice", "tool_choice needs tools, and there are none.")
    if isinstance(value, Mapping) and value.get("type") == "function":
        return ToolChoice(ToolMode.REQUIRED, _read_chosen_name(value, tools))
    modes = [mode.value for mode in ToolMode]
    if value not in modes:
        raise _wrong(
            "tool_choice",
            f"tool_choice must be {', '.join(modes)} or an object that names a function, not {value!r:.100}.",
        )
    return ToolChoice(ToolMode(value))


def _read_tool(value: Any, where: str) -> Tool:
    if not isinstance(value, Mapping):
        raise _wrong(where, f"{where} must be an object.")
    if value.get("type") != "function":
        at = f"{where}.type"
        raise _wrong(at, f"{at} must be 'function', but is {value.get('type')!r}.")
    function = value.get("function")
    where = f"{where}.function"
    if not isinstance(function, Mapping):
        raise _wrong(where, f"{where} must be an object with a name.")
    if not isinstance(function.get("description"), str | None):
        raise _wrong(f"{where}.description", f"{where}.description must be a string.")
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{where}.strict", f"{where}.strict must be true or false.")
    name = _read_name(function.get("name"), f"{where}.name")
    parameters = _read_parameters(function.get("parameters"), f"{where}.parameters")
    return Tool(name, parameters, bool(function.get("strict")))


def _read_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise _wrong(
            where,
            f"{where} must be 1 to 64 letters, digits, underscores, dots and hyphens, but is {value!r:.100}.",
        )
    return value


def _read_parameters(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return _NO_ARGUMENTS
    if not isinstance(value, Mapping):
        raise _wrong(where, f"{where} must be a JSON schema, which is an object.")
    if value.get("type", "object") != "object":
        raise _wrong(f"{where}.type", f"{where}.type must be 'object', but is {value['type']!r:.100}.")
    check_depth(value, where)
    return value if "type" in value else {**value, "type": "object"}


def _read_chosen_name(value: Mapping[str, Any], tools: Sequence[Tool]) -> str:
    function = value.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    where = "tool_choice.function.name"
    if name is None:
        raise _wrong(where, f"{where} must name one of the tools.")
    if not any(tool.name == name for tool in tools):
        raise _wrong(where, f"{where} is {name!r:.100}, but there is no such tool.")
    return str(name)


def _wrong(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_tools")
