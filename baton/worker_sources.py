"""Sources of the addresses of workers; who looks at them: baton_router/workers/discovery.py."""

from baton.core.errors import StartupError

DNS, FILE = "dns:", "file:"


def is_looked_at(source: str) -> bool:
    """Whether a source names addresses that change, and is none itself."""
    return source.startswith((DNS, FILE))


def dns_name(source: str) -> tuple[str, int]:
    """Name and port of `dns:name:port`. Raises StartupError where it is none."""
    name, _, port = source.removeprefix(DNS).rpartition(":")
    if not name or ":" in name or not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise StartupError(f"'{source}' names no workers: write dns:NAME:PORT")
    return name, int(port)


def check_source(source: str) -> None:
    """Raises StartupError for what looks like a source and is none."""
    if source.startswith(DNS):
        dns_name(source)
    elif source.startswith(FILE) and not source.startswith(f"{FILE}/"):
        raise StartupError(f"'{source}' names no workers: write file:/PATH, from the root")
