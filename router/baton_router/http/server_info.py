"""Routes for operators and developers; each is there where an option says so."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from baton.config import RouterConfig
from baton_router.served_model import ServedModel


def info_routes(served: ServedModel, options: Mapping[str, Any]) -> APIRouter:
    """Those that the options ask for; `options` are the router's, without secrets."""
    router = APIRouter()

    if served.front.enable_tokenizer_info_endpoint:

        @router.get("/tokenizer_info")
        async def tokenizer_info() -> dict[str, Any]:
            return served.tokenizer.info()

    if served.front.enable_server_info:

        @router.get("/server_info")
        async def server_info() -> dict[str, Any]:
            return {
                "version": served.version,
                "model": served.model,
                "max_model_len": served.backend.max_model_len,
                "sampling_defaults": dict(served.defaults.fields),
                "options": options,
            }

    if served.front.enable_dev_endpoints:

        @router.post("/reset_prefix_cache", response_model=None, response_class=Response)
        async def reset_prefix_cache() -> Response:
            served.backend.reset_prefix_cache()
            return Response()

    return router


def shown_options(config: RouterConfig) -> dict[str, Any]:
    """The fields of a config, and of those inside it, as JSON has them. What has no repr is a secret."""
    shown: dict[str, Any] = {}
    for row in fields(config):
        value = getattr(config, row.name)
        if is_dataclass(value):
            shown |= {
                inner.name: _as_json(getattr(value, inner.name)) for inner in fields(value) if inner.repr
            }
        elif row.repr:
            shown[row.name] = _as_json(value)
    return shown


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, str | int | float | None) else str(value)
