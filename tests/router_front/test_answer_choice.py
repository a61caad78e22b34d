"""`best_of` and beam search at both doors; which answers they find: tests/offline/test_beam_search.py."""

from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest
from baton.v1 import inference_pb2 as pb
from baton_router.beams import BeamSearch
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import FakeBackend

COMPLETIONS = ("/v1/completions", {"prompt": "hi", "max_tokens": 5, "ignore_eos": True})
CHATS = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5})


@pytest.mark.parametrize(("path", "body"), [COMPLETIONS, CHATS])
async def test_candidates_are_computed_and_counted(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, body: dict[str, Any]
) -> None:
    answer = (await client.post(path, json={**body, "n": 2, "best_of": 6})).raise_for_status().json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 6 * 5
    [request] = backend.requests
    assert (request.sampling.n, request.sampling.num_logprobs) == (6, 0)


@pytest.mark.parametrize(("path", "body"), [COMPLETIONS, CHATS])
async def test_beams(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, body: dict[str, Any]
) -> None:
    """Each step asks for one token of each beam."""
    answer = (
        (await client.post(path, json={**body, "n": 3, "use_beam_search": True})).raise_for_status().json()
    )
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 3
    assert answer["usage"]["completion_tokens"] == 3 * 5
    assert len(backend.requests) == 1 + 4 * 3
    assert {request.sampling.max_tokens for request in backend.requests} == {1}
    first = len(backend.requests[0].token_ids)
    lengths = [len(request.token_ids) - first for request in backend.requests]
    assert lengths == [0] + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3


@pytest.mark.parametrize("choice", [{"best_of": 2}, {"use_beam_search": True}])
@pytest.mark.parametrize(("path", "body"), [COMPLETIONS, CHATS])
async def test_they_are_not_streamed(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], choice: dict[str, Any]
) -> None:
    response = await client.post(path, json={**body, **choice, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream"
    assert next(iter(choice)) in response.json()["error"]["message"]


async def test_grpc_has_them(served: ServedModel) -> None:
    servicer = InferenceServicer(served)
    sampling = pb.Sampling(n=2, best_of=4, use_beam_search=True, length_penalty=0.5, max_tokens=3)
    built, _ = await servicer._generation(pb.GenerateRequest(text="hi", sampling=sampling))
    assert (built.num_candidates, built.beams) == (0, BeamSearch(4, 0.5))
    built, _ = await servicer._generation(pb.GenerateRequest(text="hi", sampling=pb.Sampling(best_of=4)))
    assert (built.num_candidates, built.beams) == (4, None)
    streamed = pb.GenerateRequest(text="hi", sampling=sampling, stream=True)
    with pytest.raises(InvalidRequest, match="use_beam_search"):
        await servicer.Generate(streamed, None)  # type: ignore[arg-type]
