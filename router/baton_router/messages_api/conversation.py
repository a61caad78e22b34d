"""Anthropic's messages, tools and choice of tools as the conversation of a chat."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baton.core.errors import InvalidRequest

Message = dict[str, Any]
_ERROR_MARK = "Error: "  # templates have no place for a result that is one


def read_messages(messages: Any, system: Any) -> list[Message]:
    """The messages as a chat template takes them. Raises InvalidRequest, with the place in `param`."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "messages must be a list of at least one message.")
    found: list[Message] = []
    if system is not None:
        found.append({"role": "system", "content": _texts(system, "system")})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise _wrong(where, f"{where} must be an object with a role and a content.")
        role, content = message.get("role"), message.get("content")
        if role == "system":
            found.append({"role": "system", "content": _texts(content, f"{where}.content")})
        elif role == "assistant":
            found.append(_of_assistant(_blocks(content, f"{where}.content")))
        elif role == "user":
            found += _of_user(_blocks(content, f"{where}.content"))
        else:
            reason = f"{where}.role must be user, assistant or system, but is {role!r}."
            raise _wrong(f"{where}.role", reason)
    return found


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as OpenAI writes them, unchecked but for their kind. Raises InvalidRequest."""
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise _wrong("tools", "tools must be a list.")
    found = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise _wrong(where, f"{where} must be an object.")
        if tool.get("type") not in (None, "custom"):
            raise _wrong(
                f"{where}.type",
                f"{where} has the type {tool['type']!r}: this server runs no tools of its own, and knows "
                "those with an input_schema alone.",
            )
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        function |= {key: tool[key] for key in ("description", "strict") if tool.get(key) is not None}
        found.append({"type": "function", "function": function})
    return found


def read_tool_choice(choice: Any) -> tuple[Any, bool]:
    """OpenAI's tool_choice, and whether several calls may stand in one answer. Raises InvalidRequest."""
    if choice is None:
        return None, True
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    parallel = not (isinstance(choice, Mapping) and choice.get("disable_parallel_tool_use"))
    match kind:
        case "auto" | "none":
            return kind, parallel
        case "any":
            return "required", parallel
        case "tool":
            return {"type": "function", "function": {"name": choice.get("name")}}, parallel
    raise _wrong("tool_choice", "tool_choice must have the type auto, any, tool or none.")


class _Block:
    """One block of a content, and where it stands."""

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        self.kind = value.get("type")
        self.value = value
        self.where = where

    def text(self, field: str = "text") -> str:
        text = self.value.get(field)
        if not isinstance(text, str):
            raise _wrong(f"{self.where}.{field}", f"{self.where}.{field} must be a string.")
        return text

    def refused(self) -> InvalidRequest:
        reason = (
            f"{self.where} has the type {self.kind!r}, which this server can't read: it serves text alone."
        )
        return _wrong(f"{self.where}.type", reason)


def _blocks(content: Any, where: str) -> list[_Block]:
    if isinstance(content, str):
        return [_Block({"type": "text", "text": content}, where)]
    if not isinstance(content, list):
        raise _wrong(where, f"{where} must be a string or a list of blocks.")
    blocks = []
    for index, block in enumerate(content):
        if not isinstance(block, Mapping):
            raise _wrong(f"{where}[{index}]", f"{where}[{index}] must be an object with a type.")
        blocks.append(_Block(block, f"{where}[{index}]"))
    return blocks


def _texts(content: Any, where: str) -> str:
    """Of a content that holds text alone."""
    texts = []
    for block in _blocks(content, where):
        if block.kind != "text":
            raise block.refused()
        texts.append(block.text())
    return "\n".join(texts)


def _of_user(blocks: Sequence[_Block]) -> Iterator[Message]:
    """What the user says, and before or after it, in their order, results of tools."""
    texts: list[str] = []
    for block in blocks:
        if block.kind == "tool_result":
            if texts:
                yield {"role": "user", "content": "\n".join(texts)}
                texts = []
            yield _of_tool(block)
        elif block.kind == "text":
            texts.append(block.text())
        else:
            raise block.refused()
    if texts or not blocks:
        yield {"role": "user", "content": "\n".join(texts)}


def _of_tool(block: _Block) -> Message:
    content = block.value.get("content")
    text = "" if content is None else _texts(content, f"{block.where}.content")
    if block.value.get("is_error"):
        text = f"{_ERROR_MARK}{text}"
    return {"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": text}


def _of_assistant(blocks: Sequence[_Block]) -> Message:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block.kind:
            case "text":
                texts.append(block.text())
            case "thinking":
                thoughts.append(block.text("thinking"))
            case "redacted_thinking":  # nobody but who has written it can read it
                pass
            case "tool_use":
                calls.append(_call(block))
            case _:
                raise block.refused()
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: _Block) -> dict[str, Any]:
    arguments = block.value.get("input")
    if not isinstance(arguments, Mapping):
        raise _wrong(f"{block.where}.input", f"{block.where}.input must be an object.")
    function = {"name": block.text("name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": block.text("id"), "type": "function", "function": function}


def _wrong(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param)
