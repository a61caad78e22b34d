"""A server without health checks: nobody asks it in `bench.gpu_check`."""

from types import SimpleNamespace

SERVICE_NAME = "grpc.health.v1.Health"


class _HealthServicer:
    async def set(self, service: str, status: int) -> None:
        """Tells nobody."""

    async def enter_graceful_shutdown(self) -> None:
        """Tells nobody."""


aio = SimpleNamespace(HealthServicer=_HealthServicer)
