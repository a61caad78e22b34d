"""Checks on the addresses that a server listens on, from the outside."""

import errno
import http.client
import ipaddress
import socket

from baton.core.errors import StartupError


def require_free_port(host: str, port: int, option: str) -> None:
    """Raise StartupError, naming the option that helps, unless a server could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise StartupError(
            f"'{host}' is not an address of this machine: choose another with --host"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"port {port} on {host} is in use: choose another with {option}") from None
        raise StartupError(f"can't listen on port {port} of {host}: {error.strerror}") from None


def reachable_host(host: str) -> str:
    """What to connect to from this machine when a server listens on `host`, ready to stand in a URL."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return host if address.version == 4 else f"[{host}]"


def answers_ok(host: str, port: int, path: str) -> bool:
    """Whether GET `path` answers 200 now; False too if nothing listens there."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
