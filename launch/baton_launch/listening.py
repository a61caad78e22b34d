"""Checks on the addresses that a server listens on, from the outside."""

import errno
import http.client
import ipaddress
import socket

from baton.config import host_of, is_loopback
from baton.core.errors import StartupError

# Addresses of nobody, for documentation (RFC 5737 and 3849).
_ELSEWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}


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


def shown_host(host: str) -> str:
    """What a person opens when a server listens on `host`, ready to stand in a URL: for all addresses the one
    that this machine has towards others."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return reachable_host(host)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_ELSEWHERE[address.version], 9))  # which sends nothing, and asks for the way
            return reachable_host(probe.getsockname()[0])
    except OSError:  # no way to anywhere
        return reachable_host(host)


def advertised_address(listen_address: str) -> str:
    """Where others reach what listens there: for all addresses of this machine the one that it has towards
    others, or else the one that its name has. The same where there is none.

    Raises StartupError where it is no address.
    """
    host = host_of(listen_address)
    if host is None or not _is_unspecified(host):
        return listen_address
    port = listen_address.rpartition(":")[2]
    own = shown_host(host)
    if is_loopback(own.strip("[]")):  # no way to anywhere, as on a network of containers alone
        try:
            own = socket.gethostbyname(socket.gethostname())
        except OSError:
            return listen_address
    return listen_address if is_loopback(own.strip("[]")) else f"{own}:{port}"


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def warning_of_strangers(host: str) -> str | None:
    """What a person should know who lets others reach a server that asks for no key; None: nobody can."""
    if is_loopback(host):
        return None
    return (
        f"everyone who can reach {shown_host(host)} can use this server: it checks no keys. Keep the port "
        "behind a firewall, or a proxy that checks them"
    )


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
