"""The router's HTTP door: OpenAI's API, with vLLM's additions."""

from fastapi import FastAPI

from router.front import Front
from router.http import errors
from router.http.chat import chat_routes
from router.http.completions import completion_routes
from router.http.middleware import BodyLimit, RequestGuard
from router.http.service_routes import model_routes, service_routes

MAX_BODY_BYTES = 32 * 2**20


def create_app(front: Front, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The ASGI app of one front."""
    # JSON that nothing is said of is taken; a form, which `curl -d` says it sends, is refused in words.
    app = FastAPI(title="Baton", version=front.version, strict_content_type=False)
    errors.install(app)
    for routes in (completion_routes, chat_routes, model_routes, service_routes):
        app.include_router(routes(front))
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(RequestGuard, metrics=front.metrics)  # added last: the outermost
    return app
