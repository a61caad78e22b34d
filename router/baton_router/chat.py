"""Chats of both doors: a conversation, with tools, becomes what the workers are asked, and the text of their
answer the parts of a message."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.fields import FormatText
from baton.core.stopping import FinishReason
from baton.grammars import formats
from baton.grammars.formats import FIELD
from baton_router.backend import GenerationRequest, TextOptions
from baton_router.chat_output import detect
from baton_router.chat_output.constraints import answer_format, limited_thinking
from baton_router.chat_output.formats import TOOL_FORMATS, ReasoningFormat, ToolFormat
from baton_router.chat_output.parser import ChatOutputParser
from baton_router.chat_output.parts import ChatDelta, ToolCallDelta
from baton_router.chat_output.tools import Tool, ToolChoice, ToolMode, read_tool_choice, read_tools
from baton_router.request_checks import build_request
from baton_router.served_model import ServedModel
from baton_router.text.chat_template import require_few_messages
from baton_router.text.messages import Message
from baton_router.text.template_options import TemplateOptions
from baton_router.text_delta import TextDelta
from baton_router.truncation import Truncation

# Where the model knows no notation of its own, an answer that has to be calls is written in this one.
_FORCED_FORMAT = TOOL_FORMATS["hermes"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a client says in a chat, unchecked."""

    messages: Sequence[Message]
    tools: Any = None  # OpenAI's
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    template: TemplateOptions = field(default_factory=TemplateOptions)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat, checked: the generation, and how its text is read."""

    generation: GenerationRequest
    tool_format: ToolFormat | None
    reasoning_format: ReasoningFormat | None
    tools: tuple[Tool, ...]
    hidden_tokens: frozenset[str]  # texts of special tokens that are no part of the answer
    is_reasoning_open: bool

    def choices(self) -> list["ChatChoice"]:
        """A reader for each choice."""
        return [ChatChoice(self) for _ in range(self.generation.sampling.n)]


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """The next piece of one choice's message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    finish_reason: str | None = None


class ChatChoice:
    """Reads the answer of one choice."""

    def __init__(self, request: ChatRequest) -> None:
        self._parser: ChatOutputParser | None = None
        if request.tool_format is not None or request.reasoning_format is not None:
            self._parser = ChatOutputParser(
                tool_format=request.tool_format,
                reasoning_format=request.reasoning_format,
                tools=request.tools,
                special_tokens=request.hidden_tokens,
                is_reasoning_open=request.is_reasoning_open,
                random_text=lambda: uuid.uuid4().hex[:24],
            )

    def push(self, delta: TextDelta) -> MessageDelta:
        """What the next piece of text adds to the message."""
        reason = None if delta.finish_reason is None else delta.finish_reason.value
        if self._parser is None:
            return MessageDelta(delta.text, finish_reason=reason)
        part = self._parser.push(delta.text)
        if delta.finish_reason is None:
            return MessageDelta(part.content, part.reasoning, part.tool_calls)
        rest = self._parser.finish()
        if delta.finish_reason is FinishReason.STOP and self._parser.has_tool_calls:
            reason = "tool_calls"
        return _joined(part, rest, reason)


async def build_chat_request(
    served: ServedModel,
    conversation: Conversation,
    fields: Mapping[str, Any],
    text: TextOptions,
    *,
    answer_id: str,
    priority: int = 0,
    cache_salt: str = "",
    add_special_tokens: bool = False,
    truncation: Truncation | None = None,
) -> ChatRequest:
    """Check a chat and render its prompt; for the other arguments see `build_request`.

    Raises InvalidRequest, with the public name of the field in `param`.
    """
    tools = read_tools(conversation.tools)
    choice = read_tool_choice(conversation.tool_choice, tools)
    tool_format = _tool_format(served, choice)
    reasoning_format = served.chat.reasoning_format
    prompt = render(served, conversation, has_tools=choice.mode is not ToolMode.NONE)
    is_open = detect.opens_reasoning(prompt, reasoning_format)
    form = answer_format(
        tool_format=tool_format,
        reasoning_format=reasoning_format,
        tools=tools,
        choice=choice,
        parallel=conversation.parallel_tool_calls,
        response=_response_format(fields),
        is_reasoning_open=is_open,
    )
    asked, is_read = dict(fields), tool_format is not None or reasoning_format is not None
    if (budget := asked.pop("thinking_token_budget", None)) is not None:
        form = limited_thinking(reasoning_format, budget, is_open=is_open, content=form)
    if form is not None and is_read:
        asked["response_format"] = None
        asked[FIELD] = formats.to_text(form, "tools" if tools else FIELD)
    generation = await build_request(
        served,
        prompt,
        asked,
        replace(text, skip_special_tokens=False) if is_read else text,
        answer_id=answer_id,
        priority=priority,
        cache_salt=cache_salt,
        add_special_tokens=add_special_tokens,
        truncation=truncation,
    )
    hidden = served.tokenizer.special_texts if text.skip_special_tokens else frozenset[str]()
    return ChatRequest(generation, tool_format, reasoning_format, tools, hidden, is_open)


def render(served: ServedModel, conversation: Conversation, *, has_tools: bool) -> str:
    """The prompt of a conversation. Raises InvalidRequest."""
    require_few_messages(len(conversation.messages))
    options = conversation.template
    if has_tools:
        variables = {**options.chat_template_kwargs, "tools": conversation.tools}
        options = replace(options, chat_template_kwargs=variables)
    return served.render(conversation.messages, options)


def _tool_format(served: ServedModel, choice: ToolChoice) -> ToolFormat | None:
    """None: no calls are looked for."""
    if choice.mode is ToolMode.NONE:
        return None
    if served.chat.tool_format is not None:
        return served.chat.tool_format
    if choice.mode is ToolMode.REQUIRED:
        return _FORCED_FORMAT
    raise InvalidRequest(
        "This model's chat template knows no notation for tools, so that it would never call one: use "
        "tool_choice 'required' or 'none', or start the server with --tool-call-parser.",
        param="tools",
        code="unsupported_parameter",
    )


def _response_format(fields: Mapping[str, Any]) -> formats.Format | None:
    form: FormatText | None = fields.get(FIELD) or fields.get("response_format")
    return None if form is None else formats.from_text(form)


def _joined(first: ChatDelta, second: ChatDelta, reason: str | None) -> MessageDelta:
    return MessageDelta(
        first.content + second.content,
        first.reasoning + second.reasoning,
        first.tool_calls + second.tool_calls,
        reason,
    )


def whole_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """Calls whose pieces are put together."""
    calls: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        before = calls.get(delta.index)
        arguments = delta.arguments if before is None else before.arguments + delta.arguments
        calls[delta.index] = replace(before or delta, arguments=arguments)
    return list(calls.values())
