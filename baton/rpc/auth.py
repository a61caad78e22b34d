"""The cluster's shared secret: who may command a worker or push pages to it."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

_HEADER = "authorization"
# Anyone may ask whether a server is healthy and what it speaks.
_OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")


def credentials(cluster_token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that proves membership of the cluster; none without a token."""
    return ((_HEADER, f"Bearer {cluster_token}"),) if cluster_token else ()


class ClusterAuth(grpc.aio.ServerInterceptor):
    """Lets only callers with the cluster's token in; the others get UNAUTHENTICATED."""

    def __init__(self, cluster_token: str) -> None:
        self._expected = f"Bearer {cluster_token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """See grpc.aio.ServerInterceptor."""
        if handler_call_details.method.startswith(_OPEN_SERVICES) or self._admits(handler_call_details):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _admits(self, details: grpc.HandlerCallDetails) -> bool:
        given = dict(details.invocation_metadata).get(_HEADER, "")
        given_bytes = given.encode() if isinstance(given, str) else given
        return hmac.compare_digest(given_bytes, self._expected)


async def _refuse(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "this worker needs the cluster's token: set BATON_CLUSTER_TOKEN, the same everywhere",
    )
