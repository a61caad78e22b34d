"""Where workers are: addresses that a router was given, or a source that names them and is looked at again.

- `host:port`, `unix:/path`: one worker.
- `dns:name:port`: one at each address that the name has, such as a service of Docker Compose or a headless
  service of Kubernetes.
- `file:/path`: one on each line of a file; what follows a `#` is a comment.
"""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

from baton.config import host_of
from baton.core.errors import StartupError
from baton.worker_sources import DNS, FILE, dns_name

LOOK_AGAIN_S = 2.0
_LOOKUP_TIMEOUT_S = 5.0
_MAX_FILE_BYTES = 1 << 20


class LookupFailed(Exception):
    """A source could not be looked at now; its workers are as they were."""


async def addresses_in(source: str) -> Sequence[str]:
    """The addresses of a source's workers now, in order. Raises LookupFailed."""
    if source.startswith(DNS):
        return await _addresses_of_name(*dns_name(source))
    if source.startswith(FILE):
        return await asyncio.to_thread(_addresses_in_file, Path(source.removeprefix(FILE)))
    return [source]


async def _addresses_of_name(name: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
            found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise LookupFailed(f"'{name}' has no address: {str(error) or 'no answer'}") from error
    hosts = {str(address[0]) for *_, address in found}
    return sorted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)


def _addresses_in_file(path: Path) -> Sequence[str]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        if len(text) > _MAX_FILE_BYTES:
            raise LookupFailed(f"'{path}' has more than {_MAX_FILE_BYTES} bytes")
        lines = [line.partition("#")[0].strip() for line in text.decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise LookupFailed(f"'{path}' can't be read: {error}") from error
    addresses = list(dict.fromkeys(line for line in lines if line))
    try:
        for address in addresses:
            host_of(address)
    except StartupError as error:
        raise LookupFailed(f"'{path}' holds what is no address: {error}") from error
    return addresses
