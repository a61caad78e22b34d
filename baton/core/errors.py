"""Every error that Baton raises on purpose.

    BatonError
    ├── InvalidRequest      the client sent something wrong          HTTP 400, INVALID_ARGUMENT
    │   └── ModelNotFound   it asked for a model that is not served  HTTP 404, NOT_FOUND
    ├── Overloaded          no room in the queue                     HTTP 503, RESOURCE_EXHAUSTED
    ├── Unavailable         no worker that could do it               HTTP 503, UNAVAILABLE
    │   ├── WorkerLost      the worker went away during the request
    │   └── TransferFailed  the prompt's pages did not reach decode; the router tries again before it tells
    ├── RequestFailed       a worker could not finish this request   HTTP 500, INTERNAL
    ├── TransferRefused     a KV transfer failed a check; fails closed
    └── StartupError        the process can't start: one line on stderr, exit code 2

`router/baton_router/http/errors.py` maps them to HTTP and `baton/rpc/errors.py` to gRPC; nothing else does.
The router makes them again of what workers say of failures: `router/baton_router/workers/worker_link.py`.
"""

from collections.abc import Iterable


class BatonError(Exception):
    """Base of the tree; its text is written for the person who reads it."""


class InvalidRequest(BatonError):
    """The client's request can't be served as sent.

    `param` names the offending field as the client spelled it, `code` is a stable word for programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(InvalidRequest):
    """The client named a model that this router does not serve."""

    def __init__(self, model: str, served: Iterable[str]) -> None:
        names = ", ".join(f"'{name}'" for name in served)
        super().__init__(
            f"The model '{model}' does not exist. This server serves {names}.",
            param="model",
            code="model_not_found",
        )


class Overloaded(BatonError):
    """No room: refused before any work was done. `retry_after_s` goes into Retry-After."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(BatonError):
    """No worker can take the request now. `retry_after_s` goes into Retry-After."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerLost(Unavailable):
    """The worker that held the request went away before the request ended."""


class TransferFailed(Unavailable):
    """The prompt's pages did not reach the decode server; nothing is wrong with the request itself."""


class RequestFailed(BatonError):
    """A worker gave up on one request; other requests are not touched."""


class TransferRefused(BatonError):
    """A frame, commit or layout failed a check. `reason` is a stable word for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StartupError(BatonError):
    """The process can't start; the text is one line that says what to do."""


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that made a task group fail; the others only followed it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
