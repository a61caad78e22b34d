"""The HTTP side of `baton chat`: OpenAI's chat completions as server-sent events."""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from baton.core.errors import RequestFailed, StartupError


class ChatClient:
    """One router, and the settings of every request to it.

    Raises StartupError if no router answers at `url`.
    """

    def __init__(
        self, url: str, model: str | None, max_tokens: int | None, temperature: float | None
    ) -> None:
        self._url = url.rstrip("/")
        # trust_env: a proxy meant for the internet can't reach a router on this machine.
        self._http = httpx.Client(timeout=httpx.Timeout(10.0, read=None), trust_env=False)
        served_model = self._served_model()
        self.model = model or served_model
        settings = {"max_tokens": max_tokens, "temperature": temperature}
        self._settings = {name: value for name, value in settings.items() if value is not None}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def answer(self, messages: Sequence[dict[str, str]]) -> Generator[str, None, None]:
        """Stream the text of the next message; closing the generator aborts the request.

        Raises RequestFailed when the router refuses it or goes away.
        """
        body = {"model": self.model, "messages": messages, "stream": True, **self._settings}
        try:
            with self._http.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise RequestFailed(_error_text(response))
                yield from _texts(_lines(response.iter_bytes()))
        except httpx.TransportError as error:
            raise RequestFailed(f"lost the router at {self._url}: {error}") from error

    def _served_model(self) -> str:
        try:
            response = self._http.get(f"{self._url}/v1/models", timeout=10.0)
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
            raise StartupError(
                f"no router answers at {self._url}: start one with `baton serve`, or name another with --url"
            ) from None


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines that end in a line feed. (`httpx.Response.iter_lines` also cuts at U+2028 and the like, which
    JSON strings may contain.)"""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace").rstrip("\r") for line in whole)


def _texts(lines: Iterable[str]) -> Iterator[str]:
    """The text in the events of one answer; RequestFailed if it ends without `[DONE]`."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise RequestFailed(str(event["error"]["message"]))
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text
    raise RequestFailed("the answer broke off")


def _error_text(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the router answered {response.status_code} {response.reason_phrase}"
