"""Maps Baton's errors to gRPC status codes; the only place that does (see baton/core/errors.py).

The details are the error's own text, the same that HTTP gives. Trailing metadata: `retry-after` (whole
seconds) where trying again can help, `error-param` and `error-code` for a wrong request.
"""

import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from baton.core.errors import (
    BatonError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    TransferRefused,
    Unavailable,
)

_log = logging.getLogger(__name__)

_CODES: tuple[tuple[type[BatonError], grpc.StatusCode], ...] = (
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (TransferRefused, grpc.StatusCode.FAILED_PRECONDITION),
)

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Any]


def status_code(error: BatonError) -> grpc.StatusCode:
    """The code of an error; INTERNAL where no narrower one fits."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


REFUSAL_REASON = "refusal-reason"  # trailing metadata of a refused transfer


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers of all four kinds raise into a status; unknown errors are logged and not told."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers UNIMPLEMENTED
            return handler
        kind = _kind(handler)
        guarded = _guard(getattr(handler, kind), handler_call_details.method)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            guarded, handler.request_deserializer, handler.response_serializer
        )
        return wrapped


def _kind(handler: "grpc.RpcMethodHandler[Any, Any]") -> str:
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    return f"{request}_{response}"


def _guard(handle: Handler, method: str) -> Handler:
    """A handler that aborts the call where `handle`, a coroutine or an async generator, raises."""
    if inspect.isasyncgenfunction(handle):

        async def guarded_stream(request: Any, context: Context) -> AsyncGenerator[Any]:
            try:
                async with aclosing(handle(request, context)) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await _abort(context, error, method)

        return guarded_stream

    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await handle(request, context)
        except Exception as error:
            await _abort(context, error, method)

    return guarded


async def _abort(context: Context, error: Exception, method: str) -> None:
    """End the call with the error's status; raises, as `context.abort` does."""
    if isinstance(error, grpc.aio.AbortError):  # the handler has ended the call itself
        raise error
    if not isinstance(error, BatonError):
        _log.error("%s failed", method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "Internal error; the server's log has it.")
    code = status_code(error)
    if code is grpc.StatusCode.INTERNAL:
        _log.error("%s failed", method, exc_info=error)
    await context.abort(code, str(error), _trailers(error))


def _trailers(error: BatonError) -> tuple[tuple[str, str], ...]:
    if isinstance(error, Overloaded | Unavailable):
        return (("retry-after", str(error.retry_after_s)),)
    if isinstance(error, InvalidRequest):
        named = (("error-param", error.param), ("error-code", error.code))
        return tuple((name, value) for name, value in named if value)
    if isinstance(error, TransferRefused):
        return ((REFUSAL_REASON, error.reason),)
    return ()
