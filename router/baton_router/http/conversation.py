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

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a conversation. What a content, or a field that is not named here, may be is the chat
    template's to say, and checked there: baton_router/text/messages.py."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[
        Any, PlainValidator(lambda value: value, json_schema_input_type=str | list[ContentPart] | None)
    ] = None
    name: str | None = None

    def as_given(self) -> dict[str, Any]:
        """Every field that the client has sent."""
        named = {} if self.name is None else {"name": self.name}
        return {**(self.model_extra or {}), **named, "role": self.role, "content": self.content}


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
            [message.as_given() for message in messages],
            add_generation_prompt=self.add_generation_prompt is not False,
            variables=self.chat_template_kwargs,
        )


class ConversationBody(TemplateBody):
    """A conversation that has to be there."""

    messages: Messages
    add_special_tokens: bool | None = False
