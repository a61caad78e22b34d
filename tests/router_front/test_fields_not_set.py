"""Fields that ask for nothing: null, which OpenAI's clients send for what is not set, and defaults."""

from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from baton_router.http.body import Body
from baton_router.http.chat import ChatBody
from baton_router.http.completions import CompletionBody
from tests.router_front.fake_backend import FakeBackend

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUIRED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 1},
}
DOCUMENTED = {
    CHAT: chat_params.CompletionCreateParamsNonStreaming,
    COMPLETIONS: completion_create_params.CompletionCreateParamsNonStreaming,
}
OURS: dict[str, type[Body]] = {CHAT: ChatBody, COMPLETIONS: CompletionBody}
NULLS = [
    (path, field)
    for path in (CHAT, COMPLETIONS)
    for field in sorted({*DOCUMENTED[path].__annotations__, *OURS[path].model_fields})
    if field not in ("messages", "prompt")
]
NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"tools": []}),
    (CHAT, {"tool_choice": "none"}),
    (CHAT, {"parallel_tool_calls": True}),
    (CHAT, {"functions": [], "function_call": "none"}),
    (CHAT, {"modalities": ["text"]}),
    (CHAT, {"verbosity": "medium"}),
    (CHAT, {"store": False, "metadata": {}, "service_tier": "auto", "safety_identifier": "x"}),
    (CHAT, {"logprobs": False, "top_logprobs": 0}),
    (CHAT, {"prompt_cache_key": "x"}),
    *((path, {"response_format": {"type": "text"}}) for path in (CHAT, COMPLETIONS)),
    *((path, {"user": "x", "stop": [], "logit_bias": {}, "n": 1}) for path in (CHAT, COMPLETIONS)),
    *((path, {"presence_penalty": 0, "frequency_penalty": 0}) for path in (CHAT, COMPLETIONS)),
    *((path, {"temperature": 1, "top_p": 1, "stream": False}) for path in (CHAT, COMPLETIONS)),
    (COMPLETIONS, {"best_of": 1, "echo": False, "suffix": ""}),
]


def test_documented_fields_are_known():
    """The list is the client's own; it would be empty if the client called its types otherwise."""
    assert {"logit_bias", "stream_options", "tools", "service_tier"} <= {
        f for path, f in NULLS if path == CHAT
    }
    assert {"logit_bias", "suffix", "best_of"} <= {f for path, f in NULLS if path == COMPLETIONS}


@pytest.mark.parametrize(("path", "field"), NULLS)
async def test_null_is_not_set(client: httpx.AsyncClient, backend: FakeBackend, path: str, field: str):
    assert (await client.post(path, json=REQUIRED[path])).status_code == 200
    for sent in (REQUIRED[path] | {field: None}, REQUIRED[path] | {field: None, "stream": True}):
        response = await client.post(path, json=sent | ({"stream": None} if field == "stream" else {}))
        assert response.status_code == 200, response.text
    plain, *others = backend.requests
    for request in others:
        assert request.token_ids == plain.token_ids
        assert request.sampling.logit_bias == plain.sampling.logit_bias == ()
        assert request.sampling.grammar == plain.sampling.grammar


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_all_at_once(client: httpx.AsyncClient, path: str):
    nulls = {field: None for where, field in NULLS if where == path}
    response = await client.post(path, json=nulls | REQUIRED[path])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "fields"), NEUTRAL, ids=str)
async def test_defaults_ask_for_nothing(client: httpx.AsyncClient, path: str, fields: dict[str, Any]):
    for more in ({}, {"stream": True}):
        response = await client.post(path, json=REQUIRED[path] | fields | more)
        assert response.status_code == 200, response.text
