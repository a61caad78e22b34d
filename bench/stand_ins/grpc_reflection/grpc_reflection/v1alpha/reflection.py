"""A server without reflection: nobody asks it in `bench.gpu_check`."""

from collections.abc import Sequence
from typing import Any

SERVICE_NAME = "grpc.reflection.v1alpha.ServerReflection"


def enable_server_reflection(service_names: Sequence[str], server: Any) -> None:
    """Adds nothing."""
