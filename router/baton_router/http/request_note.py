"""What is noted of a request while it is served, and told in the headers of its response."""

import logging
import uuid
from collections.abc import Iterable
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton_router.request_ids import chosen_id, is_id

_log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
ANTHROPIC_REQUEST_ID = "request-id"  # where Anthropic's clients look for it
IGNORED_FIELDS = "X-Baton-Ignored-Fields"
_MAX_LOGGED_NAMES = 256  # clients choose them
_MAX_NAME_LENGTH = 64
_MAX_HEADER_LENGTH = 1024


class RequestNote:
    """Of one request: what it is called, and which of its fields are ignored."""

    def __init__(self, logged_names: set[str], given_id: str | None) -> None:
        self._logged_names = logged_names
        self._given_id = given_id
        self._ignored: list[str] = []
        self.request_id = given_id if given_id and is_id(given_id) else uuid.uuid4().hex

    def choose_id(self, request_id: str | None) -> str:
        """What the request is called: by its header, else by its body. Raises InvalidRequest."""
        if self._given_id or request_id:
            self.request_id = chosen_id(**{REQUEST_ID: self._given_id, "request_id": request_id})
        return self.request_id

    def ignore(self, fields: Iterable[str]) -> None:
        """Fields that the server does not know; each name is logged when it comes for the first time."""
        for name in fields:
            shown = quote(name[:_MAX_NAME_LENGTH], safe="", errors="replace")
            self._ignored.append(shown)
            if shown not in self._logged_names and len(self._logged_names) < _MAX_LOGGED_NAMES:
                self._logged_names.add(shown)
                _log.info("requests have a field '%s', which this server does not know and ignores", shown)

    def write_to(self, headers: MutableHeaders) -> None:
        """The headers of the response."""
        headers[REQUEST_ID] = headers[ANTHROPIC_REQUEST_ID] = self.request_id
        if self._ignored:
            names = ", ".join(self._ignored)
            if len(names) > _MAX_HEADER_LENGTH:
                names = names[:_MAX_HEADER_LENGTH].rpartition(", ")[0] + ", ..."
            headers[IGNORED_FIELDS] = names


class RequestNotes:
    """Gives each request its note, and each response what stands in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._logged_names: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = RequestNote(self._logged_names, Headers(scope=scope).get(REQUEST_ID))
        state = {**scope.get("state", {}), "note": note}

        async def noted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.write_to(MutableHeaders(scope=message))
            await send(message)

        await self._app({**scope, "state": state}, receive, noted_send)


def note_of(request: Request) -> RequestNote:
    """The note of a request."""
    note: RequestNote = request.state.note
    return note
