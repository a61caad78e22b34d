"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same chats."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from baton.core.errors import InvalidRequest
from baton_router.backend import TextOptions
from baton_router.chat import ChatRequest, Conversation, build_chat_request, render
from baton_router.chat_output import tools as chat_tools
from baton_router.http.answer_models import AnthropicMessage, CountedTokens, described_events
from baton_router.http.body import Body, WholeNumber, unchecked
from baton_router.http.errors import ANSWER_ID, anthropic_error_body, log_unless_expected
from baton_router.http.event_stream import EventStream
from baton_router.http.guarded_work import ClientDisconnected, GuardedResponse
from baton_router.http.request_note import RequestNote, note_of
from baton_router.http.unsupported import MESSAGES, refuse_unsupported
from baton_router.messages_api.blocks import STOP_REASONS, BlockEvents, Event, blocks_of
from baton_router.messages_api.conversation import read_messages, read_tool_choice, read_tools
from baton_router.prompt_runs import run_prompts
from baton_router.served_model import ServedModel
from baton_router.structured_outputs import from_response_format
from baton_router.text.stop_strings import StopStrings
from baton_router.text.template_options import TemplateOptions
from baton_router.text_delta import TextDelta
from baton_router.token_counts import tokens_of

_Anything = Annotated[Any, unchecked(dict[str, Any] | None)]
_Content = str | list[dict[str, Any]]


class CountBody(Body):
    """What a prompt is made of."""

    messages: Annotated[Any, unchecked(list[dict[str, Any]])]
    system: Annotated[Any, unchecked(_Content | None)] = None
    tools: Annotated[Any, unchecked(list[dict[str, Any]] | None)] = None
    tool_choice: _Anything = None
    thinking: _Anything = None
    output_config: _Anything = None

    def conversation(self) -> Conversation:
        """As chats have it. Raises InvalidRequest."""
        choice, parallel = read_tool_choice(self.tool_choice)
        thinks = _thinking_kind(self.thinking) in ("enabled", "adaptive")
        variables: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
        effort = _object(self.output_config, "output_config").get("effort")
        return Conversation(
            read_messages(self.messages, self.system),
            tools=read_tools(self.tools),
            tool_choice=choice,
            parallel_tool_calls=parallel,
            template=TemplateOptions(
                reasoning_effort=effort if thinks else None, chat_template_kwargs=variables
            ),
        )


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: WholeNumber
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: WholeNumber | None = None
    output_format: _Anything = None
    metadata: _Anything = None
    service_tier: str | None = None

    @property
    def shows_thinking(self) -> bool:
        """Whether thinking is part of the answer."""
        display = _object(self.thinking, "thinking").get("display")
        return _thinking_kind(self.thinking) in ("enabled", "adaptive") and display != "omitted"

    def fields(self, *, can_think: bool) -> dict[str, Any]:
        """As `build_chat_request` takes them. Raises InvalidRequest."""
        budget = _object(self.thinking, "thinking").get("budget_tokens")
        if budget is not None and not (type(budget) is int and 1 <= budget < self.max_tokens):
            raise InvalidRequest(
                f"thinking.budget_tokens must be a whole number below max_tokens ({self.max_tokens}), but is "
                f"{budget!r}.",
                param="thinking.budget_tokens",
            )
        form = self.output_format or _object(self.output_config, "output_config").get("format")
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "thinking_token_budget": budget if can_think else None,
            "response_format": None if form is None else from_response_format(_as_openai(form)),
        }


def message_routes(served: ServedModel) -> APIRouter:
    """The routes of messages."""
    router = APIRouter()

    @router.post("/v1/messages", response_model=None, responses=described_events(AnthropicMessage))
    async def create_message(body: MessagesBody, request: Request) -> Response:
        served.check_model(body.model)
        note = note_of(request)
        checked, answer_id = await _checked(served, body, note)
        answer = _Answer(served, checked, answer_id, shows_thinking=body.shows_thinking)
        return GuardedResponse(answer.streamed if body.stream else answer.whole)

    @router.post("/v1/messages/count_tokens", response_model=None, responses={200: {"model": CountedTokens}})
    async def count_tokens(body: CountBody, request: Request) -> Response:
        served.check_model(body.model)
        note_of(request).ignore(refuse_unsupported(body.unknown_fields, MESSAGES))
        said = body.conversation()
        choice = chat_tools.read_tool_choice(said.tool_choice, chat_tools.read_tools(said.tools))
        text = render(served, said, has_tools=choice.mode is not chat_tools.ToolMode.NONE)
        token_ids = await tokens_of(served, text, add_special_tokens=False, name="messages", truncation=None)
        return JSONResponse({"input_tokens": len(token_ids)})

    return router


async def _checked(served: ServedModel, body: MessagesBody, note: RequestNote) -> tuple[ChatRequest, str]:
    ignored = refuse_unsupported(body.unknown_fields, MESSAGES)
    can_think = served.chat.reasoning_format is not None
    if not can_think and _thinking_kind(body.thinking) not in (None, "disabled"):
        ignored.append("thinking")
    note.ignore(ignored)
    answer_id = f"msg_{note.choose_id(None)}"
    text = TextOptions(StopStrings(body.stop_sequences or ()))
    fields = body.fields(can_think=can_think)
    return await build_chat_request(served, body.conversation(), fields, text, answer_id=answer_id), answer_id


class _Answer:
    """One message, streamed or whole."""

    def __init__(
        self, served: ServedModel, request: ChatRequest, answer_id: str, *, shows_thinking: bool
    ) -> None:
        self._served = served
        self._request = request
        self._answer_id = answer_id
        [self._choice] = request.choices()
        self._blocks = BlockEvents(shows_thinking=shows_thinking)
        self._num_cached = 0
        self._num_tokens = 0
        self._ending: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send one JSON object when all is generated."""
        scope[ANSWER_ID] = self._answer_id
        events: list[Event] = []

        async def collect(_: int, delta: TextDelta) -> None:
            events.extend(self._events(delta))

        await run_prompts(self._served, [self._request.generation], collect)
        message = self._message() | {"content": blocks_of(events), **self._ending, "usage": self._usage()}
        await JSONResponse(message)(scope, receive, send)

    async def streamed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events; an error before the first token is raised, a later one is an event."""
        scope[ANSWER_ID] = self._answer_id
        stream = EventStream(send)

        async def forward(_: int, delta: TextDelta) -> None:
            events = list(self._events(delta))
            if not stream.is_started:
                await stream.start()
                await _send(stream, {"type": "message_start", "message": self._message()})
            for event in events:
                await _send(stream, event)

        try:
            await run_prompts(self._served, [self._request.generation], forward)
            await _send(stream, {"type": "message_delta", "delta": self._ending, "usage": self._usage()})
            await _send(stream, {"type": "message_stop"})
        except Exception as error:
            if not stream.is_started or isinstance(error, ClientDisconnected):
                raise
            log_unless_expected(error, scope)
            await _send(stream, anthropic_error_body(error))
        await stream.end()

    def _events(self, delta: TextDelta) -> list[Event]:
        self._num_cached += delta.num_cached_prompt_tokens
        self._num_tokens += len(delta.tokens)
        part = self._choice.push(delta)
        events = list(self._blocks.push(part))
        if part.finish_reason is not None:
            is_sequence = part.finish_reason == "stop" and isinstance(delta.stop_reason, str)
            self._ending = {
                "stop_reason": "stop_sequence" if is_sequence else STOP_REASONS[part.finish_reason],
                "stop_sequence": delta.stop_reason if is_sequence else None,
            }
            events += self._blocks.end()
        return events

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._served.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """So far."""
        return {
            "input_tokens": len(self._request.generation.token_ids) - self._num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._num_cached,
            "output_tokens": self._num_tokens,
        }


async def _send(stream: EventStream, event: Event) -> None:
    await stream.event(event, name=event["type"])


def _thinking_kind(thinking: Any) -> str | None:
    kind = _object(thinking, "thinking").get("type")
    if thinking is not None and kind not in ("enabled", "disabled", "adaptive"):
        raise InvalidRequest("thinking.type must be enabled, adaptive or disabled.", param="thinking.type")
    return kind if isinstance(kind, str) else None


def _object(value: Any, name: str) -> Mapping[str, Any]:
    """Empty where it is left out. Raises InvalidRequest."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object.", param=name)
    return value


def _as_openai(form: Any) -> dict[str, Any]:
    schema = _object(form, "output_config.format").get("schema")
    if form.get("type") != "json_schema" or schema is None:
        raise InvalidRequest(
            "output_config.format must have the type json_schema, and a schema.", param="output_config.format"
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
