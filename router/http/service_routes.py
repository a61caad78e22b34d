"""Everything that is not a completion: models, tokens, health, version and metrics."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from baton.core.errors import InvalidRequest
from router.completion_request import check_token_ids
from router.front import Front
from router.http.chat import render
from router.http.schemas import DetokenizeBody, TokenizeBody


def service_routes(front: Front) -> APIRouter:
    """The routes about the server itself."""
    router = APIRouter()

    @router.head("/health", response_model=None)
    @router.get("/health", response_model=None)
    async def health() -> Response:
        return Response(status_code=200 if front.backend.is_ready else 503)

    @router.head("/ping", response_model=None)
    @router.get("/ping", response_model=None)
    @router.post("/ping", response_model=None)
    async def ping() -> Response:
        return await health()

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": front.version}

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        content, content_type = front.metrics.exposition()
        return Response(content, headers={"Content-Type": content_type})

    return router


def model_routes(front: Front) -> APIRouter:
    """The routes about the model and its tokens."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(front)]}

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        front.check_model(name)
        return _model(front)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        front.check_model(body.model)
        text, is_chat = _text(front, body)
        add_special_tokens = not is_chat if body.add_special_tokens is None else body.add_special_tokens
        tokens = await front.tokenizer.encode(
            text, max_tokens=front.max_counted_tokens, add_special_tokens=add_special_tokens
        )
        names = [front.tokenizer.token_name(token) for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": front.backend.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        front.check_model(body.model)
        check_token_ids("tokens", body.tokens, front.vocab_size)
        return {"prompt": front.tokenizer.decode(body.tokens, skip_special_tokens=False)}

    return router


def _text(front: Front, body: TokenizeBody) -> tuple[str, bool]:
    """The text to encode, and whether it came from a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either prompt or messages.", param="prompt")
    if body.messages is None:
        return body.prompt or "", False
    text = render(
        front,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
    return text, True


def _model(front: Front) -> dict[str, Any]:
    return {
        "id": front.model,
        "object": "model",
        "created": front.created,
        "owned_by": "baton",
        "root": front.root,
        "parent": None,
        "max_model_len": front.backend.max_model_len,
    }
