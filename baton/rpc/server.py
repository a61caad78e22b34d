"""A gRPC server as every service here runs one: bound or refused plainly, with health and reflection."""

import socket
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.core.errors import StartupError
from baton.rpc.auth import ClusterAuth
from baton.rpc.errors import ErrorInterceptor
from baton.rpc.limits import SERVER_OPTIONS

_STOP_GRACE_S = 1.0
_UNIX = "unix:"
_PROBE_TIMEOUT_S = 1.0


class RpcServer:
    """One grpc.aio server on one address; add servicers to `.grpc` before `start`."""

    def __init__(self, cluster_token: str = "") -> None:
        auth = [ClusterAuth(cluster_token)] if cluster_token else []
        self.grpc = grpc.aio.server(interceptors=[*auth, ErrorInterceptor()], options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()

    async def start(
        self, address: str, service_names: Sequence[str], flag: str, *, is_serving: bool = True
    ) -> None:
        """Serve at 'host:port' or 'unix:/path'. Raises StartupError, naming `flag`, if it can't be had.

        `is_serving`: what health checks are told, until `set_serving` says otherwise.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)
        if _is_served(address):
            raise StartupError(f"{address} is in use: choose another with {flag}")
        try:
            self.grpc.add_insecure_port(address)
        except RuntimeError:
            raise StartupError(f"{address} {_obstacle(address)}: choose another with {flag}") from None
        self._service_names = names
        await self.grpc.start()
        await self.set_serving(is_serving)

    async def set_serving(self, is_serving: bool) -> None:
        """Tell health checks, for the server as a whole ("") and each service."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuse new calls, give running ones so long, or a moment, then cut them.

        Called a second time, it can only hasten that.
        """
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(_STOP_GRACE_S if grace_s is None else grace_s)


def _is_served(address: str) -> bool:
    """Whether a process listens at 'unix:/path'.

    gRPC would take the path from it without a word, and lose its own when the other process ends and clears
    up. A socket that a dead process has left refuses connections.
    """
    if not address.startswith(_UNIX):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(address.removeprefix(_UNIX))
        except TimeoutError:  # many wait to be let in
            return True
        except OSError:
            return False
    return True


def _obstacle(address: str) -> str:
    if address.startswith(_UNIX):
        return "can't be listened at (the directory has to be there, and 107 characters are the most)"
    return "is in use, or not an address of this machine"
