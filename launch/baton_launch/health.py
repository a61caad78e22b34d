"""`baton health`: whether a server serves, for probes and for people."""

from typing import Annotated

import typer

from baton.config import host_of
from baton.core.errors import StartupError

_TIMEOUT_S = 5.0


def health(
    address: Annotated[
        str,
        typer.Argument(
            help="http://HOST:PORT of a router, or HOST:PORT or unix:/PATH of gRPC, as workers have."
        ),
    ],
) -> None:
    """Say whether the server at ADDRESS serves; the exit status is 0 where it does, and 1 where not."""
    reason = reason_not_serving(address)
    if reason is not None:
        typer.echo(f"{address} does not serve: {reason}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{address} serves")


def reason_not_serving(address: str) -> str | None:
    """Why the server does not; None: it does. Raises StartupError for what is no address."""
    return _of_http(address) if address.startswith(("http://", "https://")) else _of_grpc(address)


def _of_http(url: str) -> str | None:
    """Why a router does not serve; None where it does. Raises StartupError for what is no URL."""
    import httpx

    try:
        # trust_env: a proxy meant for the internet can't reach a server of one's own.
        response = httpx.get(f"{url.rstrip('/')}/health", timeout=_TIMEOUT_S, trust_env=False)
    except httpx.InvalidURL as error:
        raise StartupError(f"'{url}' is no address: {error}") from error
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    if response.status_code == 503:
        return "it has no workers that it could place a request on"
    return None if response.status_code == 200 else f"it answers with status {response.status_code}"


def _of_grpc(address: str) -> str | None:
    """As `_of_http`, of the standard health service."""
    host_of(address)
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S
            )
        except grpc.RpcError as error:
            return str(error.details() or error.code().name)
    is_serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return None if is_serving else "it says NOT_SERVING"
