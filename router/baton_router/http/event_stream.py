"""Server-sent events, one JSON object each."""

import asyncio
import json
from typing import Any

from starlette.types import Send

from baton_router.http.guarded_work import ClientDisconnected

SEND_TIMEOUT_S = 60.0  # a client that reads nothing for so long must not keep its place on the workers

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """The body of one response. Every method raises ClientDisconnected where a send takes a minute."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False

    async def start(self) -> None:
        """Send the status; from here on errors can only be events."""
        self.is_started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    async def event(self, content: dict[str, Any], name: str | None = None) -> None:
        """Send one object, as an event of that name."""
        head = "" if name is None else f"event: {name}\n"
        await self._body(f"{head}data: {_encode(content)}\n\n".encode())

    async def done(self) -> None:
        """Send OpenAI's mark of a complete answer."""
        await self._body(b"data: [DONE]\n\n")

    async def end(self) -> None:
        """End the body."""
        await self._body(b"", more_body=False)

    async def _body(self, data: bytes, *, more_body: bool = True) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": more_body})
        except TimeoutError:
            raise ClientDisconnected from None
