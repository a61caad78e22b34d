"""See health.py."""

from typing import Any


def add_HealthServicer_to_server(servicer: Any, server: Any) -> None:  # noqa: N802
    """Adds nothing."""
