"""Maps every error to HTTP in OpenAI's body; the only place that does (see baton/core/errors.py)."""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from baton.core.errors import BatonError, InvalidRequest, ModelNotFound, Overloaded, Unavailable

_log = logging.getLogger(__name__)

ANSWER_ID = "baton.answer_id"  # in an ASGI scope
ANTHROPIC_PATH = "/v1/messages"  # and what is below it
_ANTHROPIC_KINDS = {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
_INTERNAL_MESSAGE = "Internal error; the server's log has it."


class PayloadTooLarge(HTTPException):
    """The body is above the limit; the rest of it is not read."""

    def __init__(self, limit: int) -> None:
        message = f"The request body is larger than {limit} bytes."
        super().__init__(413, message, headers={"Connection": "close"})


def install(app: FastAPI) -> None:
    """Give every error of the app OpenAI's body; what no handler knows is the middleware's."""
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_exception)


def error_body(error: Exception) -> dict[str, Any]:
    """The `error` object of any exception; one that is not a BatonError tells nothing."""
    if isinstance(error, InvalidRequest):
        return _body(str(error), "invalid_request_error", error.param, error.code)
    if isinstance(error, Overloaded):
        return _body(str(error), "server_error", None, "overloaded")
    if isinstance(error, Unavailable):
        return _body(str(error), "server_error", None, "unavailable")
    message = str(error) if isinstance(error, BatonError) else _INTERNAL_MESSAGE
    return _body(message, "server_error", None, "internal_error")


def anthropic_error_body(error: Exception) -> dict[str, Any]:
    """The same as Anthropic has it."""
    return _as_anthropic(error_body(error), _status(error))


def _as_anthropic(body: Mapping[str, Any], status: int) -> dict[str, Any]:
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def _response(
    scope: MutableMapping[str, Any],
    body: dict[str, Any],
    status: int,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """In the shape of the API that was asked."""
    is_anthropic = scope["path"].removeprefix(scope.get("root_path", "")).startswith(ANTHROPIC_PATH)
    content = _as_anthropic(body, status) if is_anthropic else body
    return JSONResponse(content, status_code=status, headers=headers)


def log_unless_expected(error: Exception, scope: MutableMapping[str, Any]) -> None:
    """Log what is the server's own fault, with its traceback and what tells the request."""
    if not isinstance(error, InvalidRequest | Overloaded | Unavailable):
        _log.error("request %s failed", request_name(scope), exc_info=error)


def request_name(scope: MutableMapping[str, Any]) -> str:
    """What the log calls the request of an ASGI scope: the id that its answer bears, if it has one by now."""
    return str(scope.get(ANSWER_ID) or f"{scope['method']} {scope['path']}")


def internal_error_response(scope: MutableMapping[str, Any]) -> Response:
    """The answer to an exception that nobody expected."""
    return _response(scope, error_body(Exception()), 500)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    message = message.encode("utf-8", "replace").decode()  # it may quote what UTF-8 can't write
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _status(error: Exception) -> int:
    if isinstance(error, ModelNotFound):
        return 404
    if isinstance(error, InvalidRequest):
        return 400
    return 503 if isinstance(error, Overloaded | Unavailable) else 500


async def _on_baton_error(request: Request, error: Exception) -> Response:
    log_unless_expected(error, request.scope)
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["Retry-After"] = str(error.retry_after_s)
    return _response(request.scope, error_body(error), _status(error), headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = _describe(error.errors()[0])
    return _response(request.scope, _body(message, "invalid_request_error", param, None), 400)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is no {request.url.path} on this server."
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}."
    elif error.status_code == 400 and error.__cause__ is not None:
        message = _why_unreadable(error.__cause__)
    body = _body(message, "invalid_request_error", None, None)
    return _response(request.scope, body, error.status_code, error.headers)


def _describe(problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """Message and field of one problem that pydantic found."""
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "")
        return f"The body is not valid JSON: {reason} (at character {problem['loc'][-1]}).", None
    param = _path(problem["loc"][1:])
    if not param:
        return "The body must be a JSON object, sent as Content-Type: application/json.", None
    if problem["type"] == "missing":
        return f"{param} is required.", param
    return f"{param}: {problem['msg']}.", param


def _why_unreadable(error: BaseException) -> str:
    """What keeps a body from being read at all, where FastAPI says only that something does."""
    match error:
        case UnicodeDecodeError():
            return f"The body is not valid {error.encoding.upper()} (at byte {error.start})."
        case RecursionError():
            return "The body's JSON is nested too deeply."
        case ValueError():  # Python's limit of digits
            return "The body holds a number of too many digits."
        case _:
            return "The body can't be read."


def _path(location: Sequence[int | str]) -> str:
    """messages[0].role out of ("messages", 0, "role")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
