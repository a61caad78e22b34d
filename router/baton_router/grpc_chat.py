"""Chats in the public gRPC API's messages."""

import json
from typing import Any

from baton.core.errors import InvalidRequest
from baton.v1 import inference_pb2 as pb
from baton_router.chat import Conversation, MessageDelta
from baton_router.text.template_options import TemplateOptions


def conversation(chat: pb.ChatMessages) -> Conversation:
    """What a client says in a chat. Raises InvalidRequest for what is no JSON."""
    choice: Any = chat.tool_choice if chat.HasField("tool_choice") else None
    if chat.HasField("tool_name"):
        choice = {"type": "function", "function": {"name": chat.tool_name}}
    return Conversation(
        [_message(message) for message in chat.messages],
        tools=[_tool(index, tool) for index, tool in enumerate(chat.tools)],
        tool_choice=choice,
        parallel_tool_calls=chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True,
        template=_template_options(chat),
    )


def read_chat(response: pb.GenerateResponse, part: MessageDelta) -> None:
    """Put the parts of a message in the place of its text."""
    response.text = part.content
    response.reasoning = part.reasoning
    if part.finish_reason is not None:
        response.finish_reason = part.finish_reason
    for call in part.tool_calls:
        response.tool_calls.add(
            index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments
        )


def _template_options(chat: pb.ChatMessages) -> TemplateOptions:
    documents = _json(chat, "documents")
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(document, dict) for document in documents)
    ):
        raise InvalidRequest("documents must be a list of objects.", param="documents")
    variables = _json(chat, "chat_template_kwargs")
    if not isinstance(variables, dict | None):
        raise InvalidRequest("chat_template_kwargs must be an object.", param="chat_template_kwargs")
    return TemplateOptions(
        add_generation_prompt=chat.add_generation_prompt or not chat.HasField("add_generation_prompt"),
        continue_final_message=chat.continue_final_message,
        chat_template=chat.chat_template if chat.HasField("chat_template") else None,
        documents=documents,
        reasoning_effort=chat.reasoning_effort or None,
        chat_template_kwargs=variables or {},
    )


def _json(chat: pb.ChatMessages, field: str) -> Any:
    """The value of a field that holds JSON; None where it was not sent. Raises InvalidRequest."""
    if not chat.HasField(field):
        return None
    try:
        return json.loads(getattr(chat, field))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not valid JSON: {error}", param=field) from error


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    """As OpenAI's API has it; what is empty was not said."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    said = {
        "reasoning": message.reasoning,
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {
        "role": message.role,
        "content": message.content,
        **{name: value for name, value in said.items() if value},
    }


def _tool(index: int, tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "strict": tool.strict}
    if tool.parameters:
        function["parameters"] = _object(tool.parameters, f"tools[{index}].function.parameters")
    return {"type": "function", "function": function}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} is not valid JSON: {error}", param=where) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be a JSON object.", param=where)
    return value
