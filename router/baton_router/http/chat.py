"""POST /v1/chat/completions."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from baton.core.errors import InvalidRequest
from baton.core.fields import Between
from baton_router.chat import ChatRequest, MessageDelta, build_chat_request, whole_calls
from baton_router.chat_output.parts import ToolCallDelta
from baton_router.http.answer import Answer
from baton_router.http.answer_models import ChatCompletion, ChatCompletionChunk, described
from baton_router.http.body import WholeNumber, unchecked
from baton_router.http.conversation import ConversationBody
from baton_router.http.generation import GenerationBody
from baton_router.http.logprobs import ChatLogprobs, prompt_logprobs
from baton_router.http.request_note import note_of
from baton_router.http.unsupported import CHAT, refuse_unsupported
from baton_router.served_model import ServedModel
from baton_router.text_delta import TextDelta

# What thinking is called in answers: vLLM's and others' name, and the newer one.
REASONING = ("reasoning", "reasoning_content")

ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]


class ChatBody(GenerationBody, ConversationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: WholeNumber | None = None
    logprobs: bool | None = False
    top_logprobs: WholeNumber | None = None
    tool_choice: Annotated[Any, unchecked(ToolChoice | None)] = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = True


def chat_routes(served: ServedModel) -> APIRouter:
    """The routes of chat."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses=described(ChatCompletion, ChatCompletionChunk),
    )
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        served.check_model(body.model)
        body.check_stream_options()
        note = note_of(request)
        note.ignore(refuse_unsupported(body.unknown_fields, CHAT))
        answer_id = f"chatcmpl-{note.choose_id(body.request_id)}"
        checked = await _request(served, body, answer_id)
        shape = _ChatShape(served, body, checked)
        return Answer(served, body, [checked.generation], answer_id, shape).response()

    return router


async def _request(served: ServedModel, body: ChatBody, answer_id: str) -> ChatRequest:
    fields = body.sampling_fields() | {
        "logprobs": _num_logprobs(body, served.front.max_logprobs),
        "max_completion_tokens": body.max_completion_tokens,
    }
    conversation = replace(
        body.conversation(body.messages),
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    return await build_chat_request(
        served,
        conversation,
        fields,
        body.text_options(),
        answer_id=answer_id,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        add_special_tokens=bool(body.add_special_tokens),
        truncation=body.truncation(),
    )


def _num_logprobs(body: ChatBody, most: int) -> int | None:
    """Chat says in two fields what SamplingParams says in one."""
    if not body.logprobs:
        if body.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        return None
    num_logprobs = body.top_logprobs or 0
    Between(0, most).check("top_logprobs", num_logprobs)
    return num_logprobs


class _ChatShape:
    """See baton_router.http.answer.Shape."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, served: ServedModel, body: ChatBody, request: ChatRequest) -> None:
        generation = request.generation
        self._tokenizer = served.tokenizer
        self._token_ids = generation.token_ids
        self._has_token_ids = bool(body.return_token_ids)
        self._has_reasoning = body.include_reasoning is not False
        num_choices = generation.sampling.n if body.logprobs else 0
        names_ids = bool(body.return_tokens_as_token_ids)
        self._logprobs = [
            ChatLogprobs(served.tokenizer, generation, names_ids=names_ids) for _ in range(num_choices)
        ]
        self._choices = request.choices()

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """The role of every choice."""
        return [
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(num_choices)
        ]

    def top_level(self) -> dict[str, Any]:
        """The prompt's tokens, where they were asked for."""
        return {"prompt_token_ids": list(self._token_ids)} if self._has_token_ids else {}

    def chunk_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """See Shape."""
        part = self._choices[index].push(delta)
        return {"index": index, "delta": self._delta(part), **self._ending(index, delta, part)}

    def whole_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """See Shape."""
        part = self._choices[index].push(delta)
        message: dict[str, Any] = {"role": "assistant", "content": part.content, "refusal": None}
        if part.tool_calls:
            message["content"] = part.content or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in whole_calls(part.tool_calls)
            ]
        if part.reasoning and self._has_reasoning:
            message |= dict.fromkeys(REASONING, part.reasoning)
        return {"index": index, "message": message, **self._ending(index, delta, part)}

    def _delta(self, part: MessageDelta) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": part.content} if part.content else {}
        if part.reasoning and self._has_reasoning:
            delta |= dict.fromkeys(REASONING, part.reasoning)
        if part.tool_calls:
            delta["tool_calls"] = [_call_delta(call) for call in part.tool_calls]
        return delta

    def _ending(self, index: int, delta: TextDelta, part: MessageDelta) -> dict[str, Any]:
        ending: dict[str, Any] = {
            "logprobs": self._logprobs[index].push(delta.tokens) if self._logprobs else None,
            "finish_reason": part.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._has_token_ids:
            ending["token_ids"] = [token.token_id for token in delta.tokens]
        if delta.prompt_logprobs:
            ending["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, self._token_ids, delta.prompt_logprobs
            )
        return ending


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, str] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    function = {"name": call.name, **function}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
