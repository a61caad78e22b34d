"""A conversation in a body, and how it becomes a prompt."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator

from baton.core.errors import InvalidRequest
from baton_router.http.body import Body
from baton_router.served_model import ServedModel
from baton_router.text.chat_template import require_few_messages


class ContentPart(BaseModel):
    """A part of a message's content; only text is served."""

    model_config = ConfigDict(strict=True)

    type: str
    text: str | None = None


def _content(value: Any) -> str:
    """A string, or text parts, joined by line breaks; null is the empty string."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise InvalidRequest("content must be a string or a list of text parts.", param="messages")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise InvalidRequest(
            f"Content parts of type {kind!r} are not supported, only 'text'.",
            param="messages",
            code="unsupported_content",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest("A text part must have a string as its text.", param="messages")
    return text


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[
        str, PlainValidator(_content, json_schema_input_type=str | list[ContentPart] | None)
    ] = ""
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As templates know messages. Raises InvalidRequest for what belongs to tools."""
        extra = self.model_extra or {}
        if self.role in ("tool", "function") or extra.get("tool_calls") or extra.get("function_call"):
            raise InvalidRequest(
                "Messages of tools are not supported by this server.",
                param="messages",
                code="unsupported_parameter",
            )
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": self.content, **named}


def _few_messages(value: Any) -> Any:
    """The list as it is; counted before its messages are checked one by one, which is the work."""
    if isinstance(value, list):
        require_few_messages(len(value))
    return value


Messages = Annotated[list[ChatMessage], BeforeValidator(_few_messages)]


class TemplateBody(Body):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None

    def render(self, served: ServedModel, messages: Sequence[ChatMessage]) -> str:
        """The prompt of a conversation. Raises InvalidRequest where it has none."""
        if not messages:
            raise InvalidRequest("messages must hold at least one message.", param="messages")
        return served.tokenizer.render_chat(
            [message.for_template() for message in messages],
            add_generation_prompt=self.add_generation_prompt is not False,
            variables=self.chat_template_kwargs,
        )


class ConversationBody(TemplateBody):
    """A conversation that has to be there."""

    messages: Messages
    add_special_tokens: bool | None = False
