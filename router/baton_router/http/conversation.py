"""A conversation in a body, and how it becomes a prompt."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from baton_router.chat import Conversation, render
from baton_router.chat_output.tools import read_tools
from baton_router.http.body import TruncatedBody, unchecked
from baton_router.served_model import ServedModel
from baton_router.text.chat_template import require_few_messages
from baton_router.text.template_options import TemplateOptions


class ContentPart(BaseModel):
    """A part of a message's content; only text is served."""

    type: str
    text: str | None = None


class FunctionBody(BaseModel):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(BaseModel):
    """A tool; there are functions alone. Checked in baton_router/chat_output/tools.py."""

    type: Literal["function"]
    function: FunctionBody


class ChatMessage(BaseModel):
    """One message of a conversation. What a content, or a field that is not named here, may be is the chat
    template's to say, and checked there: baton_router/text/messages.py."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[Any, unchecked(str | list[ContentPart] | None)] = None
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


class TemplateBody(TruncatedBody):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[Any, unchecked(list[ToolBody] | None)] = None

    def conversation(self, messages: Sequence[ChatMessage]) -> Conversation:
        """What the body says, with these messages."""
        return Conversation(
            [message.as_given() for message in messages],
            tools=self.tools,
            template=TemplateOptions(
                add_generation_prompt=self.add_generation_prompt is not False,
                continue_final_message=bool(self.continue_final_message),
                chat_template=self.chat_template,
                documents=self.documents,
                reasoning_effort=self.reasoning_effort,
                chat_template_kwargs=self.chat_template_kwargs or {},
            ),
        )

    def render(self, served: ServedModel, messages: Sequence[ChatMessage]) -> str:
        """The prompt of a conversation. Raises InvalidRequest where it has none."""
        return render(served, self.conversation(messages), has_tools=bool(read_tools(self.tools)))


class ConversationBody(TemplateBody):
    """A conversation that has to be there."""

    messages: Messages
    add_special_tokens: bool | None = False
