"""What clients get of their prompts' log probabilities: vLLM's field, and OpenAI's echo with logprobs."""

import json
from typing import Any

import httpx
import pytest

from baton.v1 import inference_pb2
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import FakeBackend

PROMPT = "hello world"


async def choices_of(client: httpx.AsyncClient, path: str, **fields: Any) -> list[list[dict[str, Any]]]:
    """The objects of each choice: one, or with `stream` one a chunk."""
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return [[choice] for choice in response.json()["choices"]]
    events = [
        line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        for choice in json.loads(event)["choices"]:
            found.setdefault(choice["index"], []).append(choice)
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_choice_of_a_completion_has_them(
    client: httpx.AsyncClient, served: ServedModel, stream: bool
) -> None:
    prompt = served.tokenizer.encode_now(PROMPT)
    fields = {"prompt": [PROMPT, prompt[:1]], "prompt_logprobs": 2, "n": 2, "max_tokens": 3, "stream": stream}
    choices = await choices_of(client, "/v1/completions", **fields)
    for first, *others in choices[:2]:
        nothing, *found = first["prompt_logprobs"]
        assert nothing is None
        assert all(str(token_id) in entry for token_id, entry in zip(prompt[1:], found, strict=True))
        assert found[0][str(prompt[1])] == {
            "logprob": -1.0,
            "rank": None,
            "decoded_token": served.tokenizer.decode([prompt[1]], skip_special_tokens=False),
        }
        assert found[0][str(prompt[1] + 1)]["rank"] == 1
        assert not any("prompt_logprobs" in other for other in others)
    for first, *_ in choices[2:]:  # a prompt of one token
        assert first["prompt_logprobs"] == [None]


async def test_a_chat_has_them(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    messages = [{"role": "user", "content": "hi"}]
    [[choice]] = await choices_of(client, "/v1/chat/completions", messages=messages, prompt_logprobs=0)
    [request] = backend.requests
    assert [list(entry) for entry in choice["prompt_logprobs"][1:]] == [
        [str(token_id)] for token_id in request.token_ids[1:]
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_echo_with_logprobs(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, stream: bool, max_tokens: int
) -> None:
    """As evaluations ask for the likelihood of a text: the prompt's tokens, then the answer's."""
    fields = {
        "prompt": PROMPT,
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "stream": stream,
        "n": 2,
    }
    prompt = served.tokenizer.encode_now(PROMPT)
    for chunks in await choices_of(client, "/v1/completions", **fields):
        text = "".join(chunk["text"] for chunk in chunks)
        assert text.startswith(PROMPT)
        logprobs: dict[str, list[Any]] = {}
        for chunk in chunks:
            for name, values in chunk["logprobs"].items():
                logprobs.setdefault(name, []).extend(values)
        assert {len(values) for values in logprobs.values()} == {len(prompt) + max_tokens}
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1 : len(prompt)] == [-1.0 - i for i in range(len(prompt) - 1)]
        spelled = "".join(logprobs["tokens"])
        assert PROMPT in spelled
        offsets = logprobs["text_offset"]
        assert offsets == sorted(offsets)
        assert chunks[-1]["finish_reason"] == "length"
        if not max_tokens:
            assert text == PROMPT
    [request] = backend.requests
    assert request.sampling.num_prompt_logprobs == 1


async def test_grpc_has_them_on_the_first_message(served: ServedModel) -> None:
    sampling = inference_pb2.Sampling(prompt_logprobs=1, max_tokens=3, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling, stream=True)
    responses: list[inference_pb2.GenerateResponse] = []

    class Context:
        async def write(self, response: inference_pb2.GenerateResponse) -> None:
            responses.append(response)

    await InferenceServicer(served).Generate(request, Context())  # type: ignore[arg-type]
    prompt = served.tokenizer.encode_now(PROMPT)
    assert [token.token_id for token in responses[0].prompt_logprobs] == prompt[1:]
    assert responses[0].prompt_logprobs[0].logprob == -1.0
    assert not any(response.prompt_logprobs for response in responses[1:])
