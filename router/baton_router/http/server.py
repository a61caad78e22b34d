"""uvicorn as the router runs it."""

import contextlib
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

# Longer than any usual client or proxy keeps an idle connection (httpx 5 s, aiohttp 15 s, most proxies 60 s):
# whoever closes last never closes one that a request is on its way over.
KEEP_ALIVE_S = 75


class HttpServer(uvicorn.Server):
    """One server, without uvicorn's own signal handlers: the process has one place for signals.

    HTTP is parsed by h11. uvicorn's faster parser, httptools, takes heads of any length, and loses the body
    of a request that offers another protocol, as Java's HttpClient does unasked (`Upgrade: h2c`).
    """

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=None,  # the router's main says when
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
