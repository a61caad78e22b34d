"""Everything that is not a completion: models, tokens, health, version and metrics."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from baton.core.errors import InvalidRequest
from baton_router.http.answer_models import Detokenized, Load, Model, Models, Tokens, Version, described
from baton_router.http.body import Body
from baton_router.http.conversation import Messages, TemplateBody
from baton_router.http.request_note import note_of
from baton_router.served_model import ServedModel
from baton_router.token_counts import text_of, tokens_of

_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "No worker is there; no body"}}


class TokenizeBody(TemplateBody):
    """POST /tokenize: a prompt or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]


def service_routes(served: ServedModel) -> APIRouter:
    """The routes about the server itself."""
    router = APIRouter()

    @router.get("/live", response_model=None, response_class=Response)
    async def live() -> Response:
        """That the process answers; whether it has workers, /health says."""
        return Response()

    @router.get("/health", response_model=None, response_class=Response, responses=_NOT_READY)
    async def health() -> Response:
        return Response(status_code=200 if served.backend.is_ready else 503)

    @router.get("/ping", response_model=None, response_class=Response, responses=_NOT_READY)
    @router.post("/ping", response_model=None, response_class=Response, responses=_NOT_READY)
    async def ping() -> Response:
        return await health()

    @router.get("/load", response_model=None, responses=described(Load))
    async def load() -> dict[str, int]:
        return {"server_load": served.metrics.num_running}

    @router.get("/version", response_model=None, responses=described(Version))
    async def version() -> dict[str, str]:
        return {"version": served.version}

    @router.get("/metrics", response_model=None, response_class=PlainTextResponse)
    async def metrics() -> Response:
        content, content_type = served.metrics.exposition()
        return Response(content, headers={"Content-Type": content_type})

    return router


def model_routes(served: ServedModel) -> APIRouter:
    """The routes about the model and its tokens."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None, responses=described(Models))
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served, name) for name in served.names]}

    @router.get("/v1/models/{name:path}", response_model=None, responses=described(Model))
    async def retrieve_model(name: str) -> dict[str, Any]:
        if not name:
            return await list_models()
        served.check_model(name)
        return _model(served, name)

    @router.post("/tokenize", response_model=None, responses=described(Tokens))
    async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
        served.check_model(body.model)
        note_of(request).ignore(body.unknown_fields)
        text, is_chat = _text(served, body)
        add_special_tokens = not is_chat if body.add_special_tokens is None else body.add_special_tokens
        tokens = await tokens_of(
            served,
            text,
            add_special_tokens=add_special_tokens,
            name="messages" if is_chat else "prompt",
            truncation=body.truncation(),
        )
        names = [served.tokenizer.token_name(token) for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": served.backend.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }

    @router.post("/detokenize", response_model=None, responses=described(Detokenized))
    async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
        served.check_model(body.model)
        note_of(request).ignore(body.unknown_fields)
        return {"prompt": await text_of(served, body.tokens, name="tokens")}

    return router


def _text(served: ServedModel, body: TokenizeBody) -> tuple[str, bool]:
    """The text to encode, and whether it came from a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either prompt or messages.", param="prompt")
    if body.messages is None:
        return body.prompt or "", False
    return body.render(served, body.messages), True


def _model(served: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "baton",
        "root": served.root,
        "parent": None,
        "max_model_len": served.backend.max_model_len,
    }
