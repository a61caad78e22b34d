"""Work on a request that ends when its client goes away."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.core.errors import first_error

_log = logging.getLogger(__name__)

Answer = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientDisconnected(Exception):
    """Nobody is there to read the answer."""


class GuardedResponse(Response):
    """A response whose work runs while it is being sent, and is cancelled when the client disconnects.

    What `answer` raises before it has sent anything goes to the app's error handlers.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; returns only when the work has ended, its generators closed."""
        try:
            await _run_while_connected(self._answer(scope, receive, send), receive)
        except ClientDisconnected:
            _log.debug("The client of %s went away", scope["path"])


async def _run_while_connected(work: Awaitable[None], receive: Receive) -> None:
    """Raises ClientDisconnected, after cancelling the work, or what the work raises."""
    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_raise_on_disconnect(receive))
            await work
            watch.cancel()
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None


async def _raise_on_disconnect(receive: Receive) -> NoReturn:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
