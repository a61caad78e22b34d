"""A model of several names: clients may use any, each is listed, and answers bear the first."""

from dataclasses import replace
from typing import Any, cast

import httpx
import pytest

from baton.v1 import inference_pb2 as pb
from baton_router.grpc_front import InferenceServicer
from baton_router.http.app import create_app
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import MODEL

NAMES = [MODEL, "gpt-4o", "org/model"]


@pytest.fixture
def served(served: ServedModel) -> ServedModel:
    return replace(served, other_names=tuple(NAMES[1:]))


async def test_http(served: ServedModel) -> None:
    transport = httpx.ASGITransport(create_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == NAMES
        assert len({model["root"] for model in models}) == 1
        for name in NAMES:
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
            answer = await client.post("/v1/completions", json={"model": name, "prompt": "hi"})
            assert (answer.status_code, answer.json()["model"]) == (200, MODEL)
        wrong = (await client.get("/v1/models/other")).json()["error"]["message"]
        assert all(f"'{name}'" in wrong for name in NAMES)


async def test_grpc(served: ServedModel) -> None:
    models = await InferenceServicer(served).ListModels(pb.ListModelsRequest(), cast(Any, None))
    assert [model.id for model in models.models] == NAMES
