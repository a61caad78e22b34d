"""The router's HTTP door: OpenAI's API, with vLLM's additions."""

from fastapi import FastAPI

from baton_router.http import errors
from baton_router.http.chat import chat_routes
from baton_router.http.completions import completion_routes
from baton_router.http.middleware import BodyLimit, RequestGuard, RequestTarget
from baton_router.http.request_note import RequestNotes
from baton_router.http.service_routes import model_routes, service_routes
from baton_router.served_model import ServedModel

MAX_BODY_BYTES = 32 * 2**20


def create_app(served: ServedModel, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The ASGI app of one served."""
    # JSON that nothing is said of is taken; a form, which `curl -d` says it sends, is refused in words.
    app = FastAPI(title="Baton", version=served.version, strict_content_type=False)
    errors.install(app)
    for routes in (completion_routes, chat_routes, model_routes, service_routes):
        app.include_router(routes(served))
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(RequestGuard, metrics=served.metrics)
    app.add_middleware(RequestNotes)
    app.add_middleware(RequestTarget)  # added last: the outermost
    return app
