"""Ports for servers that tests start: below those that systems give to whoever connects, and drawn, so that
tests that run beside each other don't meet."""

import random
import socket

_FIRST_PORT, _LAST_PORT = 10_000, 32_000
_random = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    while True:
        port = _random.randrange(_FIRST_PORT, _LAST_PORT)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
