"""The router's HTTP door: OpenAI's API, with vLLM's additions."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from baton_router.http import api_document, errors
from baton_router.http.chat import chat_routes
from baton_router.http.completions import completion_routes
from baton_router.http.messages import message_routes
from baton_router.http.middleware import BodyLimit, RequestGuard, RequestTarget
from baton_router.http.request_note import IGNORED_FIELDS, REQUEST_ID, RequestNotes
from baton_router.http.server_info import info_routes
from baton_router.http.service_routes import model_routes, service_routes
from baton_router.served_model import ServedModel

MAX_BODY_BYTES = 32 * 2**20


def create_app(
    served: ServedModel,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    options: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The ASGI app of one served; `options` are the router's, for those who may see them."""
    front = served.front
    # JSON that nothing is said of is taken; a form, which `curl -d` says it sends, is refused in words.
    app = FastAPI(
        title="Baton",
        version=served.version,
        strict_content_type=False,
        redirect_slashes=False,  # to an address that a proxy in front may not have, and clients lose bodies
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    for routes in (completion_routes, chat_routes, message_routes, model_routes, service_routes):
        app.include_router(routes(served))
    app.include_router(info_routes(served, options or {}))
    api_document.install(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(RequestGuard, metrics=served.metrics)
    if front.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=front.allowed_origins,
            allow_methods=front.allowed_methods,
            allow_headers=front.allowed_headers,
            allow_credentials=front.allow_credentials,
            expose_headers=(REQUEST_ID, IGNORED_FIELDS),
        )
    app.add_middleware(RequestNotes)
    app.add_middleware(RequestTarget, root_path=front.root_path)  # added last: the outermost
    return app
