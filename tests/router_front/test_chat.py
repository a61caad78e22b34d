"""POST /v1/chat/completions and the routes about the server, without a socket."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from baton_router import served_model
from baton_router.http.app import create_app
from baton_router.served_model import ServedModel
from baton_router.text.chat_template import MAX_MESSAGES
from tests.router_front.fake_backend import MODEL, FakeBackend

MESSAGES = [{"role": "user", "content": "hi"}]


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4} | fields
    )
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(served: ServedModel, backend: FakeBackend) -> str:
    return served.tokenizer.decode(backend.requests[-1].token_ids, skip_special_tokens=False)


async def test_whole_answer(client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel):
    answer = await chat(client, return_token_ids=True)
    [choice] = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["prompt_token_ids"] == list(backend.requests[0].token_ids)
    assert choice["token_ids"] == backend.reply[:4]
    text = served.tokenizer.decode(backend.reply[:4])
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert prompt_of(served, backend) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_stream_opens_with_every_role(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
):
    body = {
        "messages": MESSAGES,
        "max_completion_tokens": 4,
        "max_tokens": 200,
        "n": 2,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
        "return_token_ids": True,
    }
    response = await client.post("/v1/chat/completions", json=body)
    *events, _, _ = response.text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, *range(9), 8]
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert [("prompt_token_ids" in chunk) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == served.tokenizer.decode(backend.reply[:4])
        token_ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
        assert token_ids == backend.reply[:4]
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]


async def test_default_is_what_is_left(client: httpx.AsyncClient, backend: FakeBackend):
    await chat(client, max_tokens=None)
    request = backend.requests[0]
    assert request.sampling.max_tokens == backend.max_model_len - len(request.token_ids)


async def test_logprobs(client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel):
    backend.reply = served.tokenizer.encode_now("🎉")
    answer = await chat(client, logprobs=True, top_logprobs=2, max_tokens=len(backend.reply))
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "🎉".encode()
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(backend.reply)
    answer = await chat(client, logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_text_parts_and_template_variables(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(
        client,
        messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}],
        add_generation_prompt=False,
        chat_template_kwargs={"extra": "EXTRA"},
    )
    expected = "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n<|im_end|>\nEXTRA"
    assert prompt_of(served, backend) == expected


async def test_models(client: httpx.AsyncClient):
    models = (await client.get("/v1/models")).json()
    [model] = models["data"]
    assert (model["id"], model["max_model_len"], model["root"]) == (MODEL, 256, "/models/tiny")
    assert (await client.get(f"/v1/models/{MODEL}")).json() == model
    missing = await client.get("/v1/models/other/model")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_tokenize_and_back(client: httpx.AsyncClient, served: ServedModel):
    answer = (await client.post("/tokenize", json={"prompt": "hi 🎉", "return_token_strs": True})).json()
    assert answer["tokens"] == served.tokenizer.encode_now("hi 🎉")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "hi 🎉"}
    chat_tokens = (await client.post("/tokenize", json={"messages": MESSAGES})).json()["tokens"]
    back = await client.post("/detokenize", json={"model": MODEL, "tokens": chat_tokens})
    assert back.json()["prompt"].startswith("<|im_start|>user\nhi")


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": MESSAGES}, {"messages": []}])
async def test_tokenize_wants_one_input(client: httpx.AsyncClient, body: dict[str, Any]):
    assert (await client.post("/tokenize", json=body)).status_code == 400


async def test_tokenize_counts_what_no_request_could_have(client: httpx.AsyncClient, served: ServedModel):
    """A document may be longer than the model's length; its tokens are told all the same."""
    text = "hello wörld " * 1500
    answer = (await client.post("/tokenize", json={"prompt": text})).json()
    assert answer["tokens"] == served.tokenizer.encode_now(text)
    assert answer["count"] > 8 * served.backend.max_model_len


async def test_conversation_of_as_many_messages_as_may_be(served: ServedModel):
    conversation = [{"role": "user", "content": "x"}] * MAX_MESSAGES
    transport = httpx.ASGITransport(create_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        assert (await client.post("/tokenize", json={"messages": conversation})).status_code == 200
        one_more = [*conversation, conversation[0]]
        assert (await client.post("/tokenize", json={"messages": one_more})).status_code == 400


async def test_detokenize_checks_ids(client: httpx.AsyncClient):
    for tokens in ([10**6], [-1], [10**30]):
        response = await client.post("/detokenize", json={"tokens": tokens})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_counted_tokens_are_bounded(
    client: httpx.AsyncClient, served: ServedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served_model, "_COUNTED_TOKENS", 300)
    few, many = "<tool call>" * 300, "<tool call>" * 301
    for body, param in (
        ({"prompt": many}, "prompt"),
        ({"messages": [{"role": "user", "content": many}]}, "messages"),
    ):
        response = await client.post("/tokenize", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert "300" in response.json()["error"]["message"]
    tokens = (await client.post("/tokenize", json={"prompt": few})).json()["tokens"]
    assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": few}
    response = await client.post("/detokenize", json={"tokens": [*tokens, 5]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


async def test_many_tokens_are_decoded_off_the_loop(served: ServedModel):
    tokens = served.tokenizer.encode_now("hello wörld ") * 20_000
    decoding = asyncio.create_task(served.tokenizer.decode_many(tokens))
    num_turns = 0
    while not decoding.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns > 2  # on the loop it would be over in the first
    assert await decoding == "hello wörld " * 20_000


async def test_health_follows_the_backend(client: httpx.AsyncClient, backend: FakeBackend):
    for ready, status in ((True, 200), (False, 503)):
        backend.is_ready = ready
        assert (await client.get("/health")).status_code == status
        assert (await client.head("/health")).status_code == status
        assert (await client.get("/ping")).status_code == status
        assert (await client.post("/ping")).status_code == status
    assert (await client.get("/version")).json() == {"version": "0.1.0"}


async def test_api_description_is_there(client: httpx.AsyncClient):
    assert "/v1/chat/completions" in (await client.get("/openapi.json")).json()["paths"]
