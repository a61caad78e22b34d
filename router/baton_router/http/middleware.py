"""What stands around every HTTP request: counting, the size limit and the last net for errors.

Plain ASGI, because Starlette's BaseHTTPMiddleware hides http.disconnect from the endpoints.
"""

import logging
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton_router.http.errors import PayloadTooLarge, internal_error_response, request_name
from baton_router.metrics import FrontMetrics

_log = logging.getLogger(__name__)

_PROBES = frozenset({"/health", "/live", "/metrics", "/ping"})
_CLIENT_GONE = 499  # nginx's number for a request that its client gave up


class RequestGuard:
    """Counts each request by route and status, and answers 500 where the app raises."""

    def __init__(self, app: ASGIApp, metrics: FrontMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_GONE

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            _log.exception("request %s failed", request_name(scope))
            if status != _CLIENT_GONE:  # the answer has begun: all that is left is to cut it off
                raise
            await internal_error_response(scope)(scope, receive, watched_send)
        finally:
            endpoint = _endpoint(scope)
            if endpoint not in _PROBES:  # their number says nothing, and 503 is an answer there
                self._metrics.http_requests.labels(endpoint, str(status)).inc()


class RequestTarget:
    """Lets the app see one form of requests: GET for HEAD, whose body the server leaves out, and the path of
    a target that names scheme and host as well, as proxies send it (RFC 9112, 3.2.2). Paths may begin with
    `root_path`, and those that the app writes do."""

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            path, raw_path = scope["path"], scope.get("raw_path", b"")
            if path.lower().startswith(("http://", "https://")):
                path = "/" + path.split("/", 3)[3] if path.count("/") > 2 else "/"
                raw_path = quote(path).encode()
            scope = {
                **scope,
                "method": method,
                "path": path,
                "raw_path": raw_path,
                "root_path": self._root_path,
            }
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies above a number of bytes, whether or not they announce their length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        announced = _content_length(scope) if scope["type"] == "http" else 0
        num_received = 0

        async def limited_receive() -> Message:
            nonlocal num_received
            if announced > self._max_bytes:
                raise PayloadTooLarge(self._max_bytes)
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise PayloadTooLarge(self._max_bytes)
            return message

        await self._app(scope, limited_receive, send)


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _endpoint(scope: MutableMapping[str, Any]) -> str:
    """The route's own path, of which there are few, rather than what the client asked for."""
    return getattr(scope.get("route"), "path", "unmatched")
