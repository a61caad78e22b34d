"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from baton.core.errors import InvalidRequest
from baton.core.fields import Between
from baton_router.backend import GenerationRequest
from baton_router.http.answer import Answer
from baton_router.http.body import WholeNumber
from baton_router.http.conversation import ConversationBody
from baton_router.http.generation import GenerationBody
from baton_router.http.logprobs import ChatLogprobs
from baton_router.http.request_note import note_of
from baton_router.http.unsupported import CHAT, refuse_unsupported
from baton_router.request_checks import build_request
from baton_router.served_model import ServedModel
from baton_router.text_stream import TextDelta


class ChatBody(GenerationBody, ConversationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: WholeNumber | None = None
    logprobs: bool | None = False
    top_logprobs: WholeNumber | None = None


def chat_routes(served: ServedModel) -> APIRouter:
    """The routes of chat."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        served.check_model(body.model)
        body.check_stream_options()
        note = note_of(request)
        note.ignore(refuse_unsupported(body.unknown_fields, CHAT))
        answer_id = f"chatcmpl-{note.choose_id(body.request_id)}"
        checked = await _request(served, body, answer_id)
        shape = _ChatShape(served, body, checked)
        return Answer(served, body, [checked], answer_id, shape).response()

    return router


async def _request(served: ServedModel, body: ChatBody, answer_id: str) -> GenerationRequest:
    fields = body.sampling_fields() | {
        "logprobs": _num_logprobs(body, served.front.max_logprobs),
        "max_completion_tokens": body.max_completion_tokens,
    }
    text = body.text_options()
    return await build_request(
        served,
        body.render(served, body.messages),
        fields,
        text,
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

    def __init__(self, served: ServedModel, body: ChatBody, request: GenerationRequest) -> None:
        self._request = request
        self._has_token_ids = bool(body.return_token_ids)
        num_choices = request.sampling.n if body.logprobs else 0
        names_ids = bool(body.return_tokens_as_token_ids)
        self._logprobs = [
            ChatLogprobs(served.tokenizer, request, names_ids=names_ids) for _ in range(num_choices)
        ]

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
        return {"prompt_token_ids": list(self._request.token_ids)} if self._has_token_ids else {}

    def chunk_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """See Shape."""
        content = {"content": delta.text} if delta.text else {}
        return {"index": index, "delta": content, **self._ending(index, delta)}

    def whole_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """See Shape."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": index, "message": message, **self._ending(index, delta)}

    def _ending(self, index: int, delta: TextDelta) -> dict[str, Any]:
        ending: dict[str, Any] = {
            "logprobs": self._logprobs[index].push(delta.tokens) if self._logprobs else None,
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if self._has_token_ids:
            ending["token_ids"] = [token.token_id for token in delta.tokens]
        return ending
