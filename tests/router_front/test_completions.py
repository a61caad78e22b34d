"""POST /v1/completions, whole and streamed, without a socket."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from baton_router.http.app import create_app
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import MODEL, NUM_CACHED, FakeBackend
from tests.router_front.test_detokenizer import LLAMA

REPLY = "hello world 🎉 the quick brown fox stop here"


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 60} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, [DONE] checked and taken off."""
    response = await client.post(
        "/v1/completions", json={"prompt": "hi", "max_tokens": 60, "stream": True} | fields
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


async def test_whole_answer(client: httpx.AsyncClient, backend: FakeBackend):
    answer = await complete(client, model=MODEL, max_tokens=len(backend.reply))
    [choice] = answer["choices"]
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert choice == {
        "index": 0,
        "text": REPLY,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    num_prompt = len(backend.requests[0].token_ids)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(backend.reply),
        "total_tokens": num_prompt + len(backend.reply),
        "prompt_tokens_details": {"cached_tokens": NUM_CACHED},
    }


@pytest.mark.parametrize("tokens_per_delta", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"stop": "fox st"}, {"n": 2, "stop": ["zzz", "quick"]}])
async def test_streamed_text_is_the_whole_text(
    client: httpx.AsyncClient, backend: FakeBackend, tokens_per_delta: int, fields: dict[str, Any]
):
    backend.tokens_per_delta = tokens_per_delta
    answer = await complete(client, **fields)
    events = await stream(client, **fields)
    for choice in answer["choices"]:
        assert text_of(events, choice["index"]) == choice["text"]
    finishes = [c["finish_reason"] for event in events for c in event["choices"] if c["finish_reason"]]
    assert finishes == [choice["finish_reason"] for choice in answer["choices"]]


async def test_default_max_tokens_is_sixteen_cut_to_what_is_left(
    client: httpx.AsyncClient, backend: FakeBackend
):
    await client.post("/v1/completions", json={"prompt": "hi"})
    await client.post("/v1/completions", json={"prompt": [5] * 250})
    assert [request.sampling.max_tokens for request in backend.requests] == [16, 6]


async def test_end_of_sequence_is_a_token_but_no_text(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = [*served.tokenizer.encode_now("end"), *served.eos_token_ids]
    answer = await complete(client, return_token_ids=True, skip_special_tokens=False)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("end", "stop")
    assert choice["token_ids"] == backend.reply
    answer = await complete(client, ignore_eos=True, max_tokens=2 * len(backend.reply))
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("endend", "length")


async def test_half_character_at_the_end_is_flushed(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = served.tokenizer.encode_now("🎉")
    answer = await complete(client, max_tokens=len(backend.reply) - 1)
    assert answer["choices"][0]["text"] == "\ufffd"


async def test_prompts_of_every_form(client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel):
    ids = served.tokenizer.encode_now("fox")
    for prompt in ("fox", ids, ["fox"], [ids]):
        await complete(client, prompt=prompt)
    assert {request.token_ids for request in backend.requests} == {tuple(ids)}


async def test_several_prompts_run_together(client: httpx.AsyncClient, backend: FakeBackend):
    answer = await complete(client, prompt=["a", [7, 8], "c"], n=2, return_token_ids=True, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [c["prompt_token_ids"] == [7, 8] for c in answer["choices"]] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert backend.most_running == 3
    assert len({request.request_id for request in backend.requests}) == 3
    events = await stream(client, prompt=["a", [7, 8], "c"], n=2, max_tokens=3)
    assert [text_of(events, index) for index in range(6)] == [c["text"] for c in answer["choices"]]


async def test_prompts_of_one_request_are_bounded(client: httpx.AsyncClient, backend: FakeBackend):
    answer = await complete(client, prompt=["a"] * 100, max_tokens=1)
    assert len(answer["choices"]) == 100
    assert backend.most_running == 64


async def test_usage_in_streams(client: httpx.AsyncClient):
    whole = await complete(client, max_tokens=4)
    events = await stream(client, max_tokens=4, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    events = await stream(client, max_tokens=4, stream_options={"continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 4]
    assert events[-1]["usage"] == whole["usage"]
    assert await stream(client, max_tokens=4, stream_options={})
    for options in ({"include_usage": False}, {"include_usage": None}):
        off = options | {"continuous_usage_stats": True}
        assert all("usage" not in e for e in await stream(client, max_tokens=4, stream_options=off))
    assert all("usage" not in event for event in await stream(client, max_tokens=4))


async def test_tokens_without_text_are_events_too(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    """Half a character is held back, but clients time tokens by events."""
    backend.reply = served.tokenizer.encode_now("🎉")
    assert len(backend.reply) > 1
    events = await stream(client, max_tokens=len(backend.reply))
    texts = [event["choices"][0]["text"] for event in events]
    assert texts == [""] * (len(backend.reply) - 1) + ["🎉"]


async def test_logprobs(client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel):
    backend.reply = served.tokenizer.encode_now("the🎉fox")
    [choice] = (await complete(client, logprobs=2, max_tokens=len(backend.reply)))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5] * len(backend.reply)
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * len(backend.reply)
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] < len(choice["text"])
    events = await stream(client, logprobs=2, max_tokens=len(backend.reply))
    parts = [event["choices"][0]["logprobs"] for event in events]
    joined = {key: [item for part in parts for item in part[key]] for key in logprobs}
    assert joined == logprobs


async def test_logprobs_that_json_cannot_hold(client: httpx.AsyncClient, backend: FakeBackend, monkeypatch):
    from baton.core.sampling import SampledToken
    from tests.router_front import fake_backend

    monkeypatch.setattr(fake_backend, "_sampled", lambda params, i: SampledToken(i, float("-inf")))
    answer = await complete(client, logprobs=0, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


async def test_echo(client: httpx.AsyncClient, served: ServedModel):
    ids = served.tokenizer.encode_now("fox")
    answer = await complete(client, prompt=["hi there", ids], echo=True, max_tokens=1)
    plain = await complete(client, prompt=["hi there", ids], max_tokens=1)
    texts = [choice["text"] for choice in plain["choices"]]
    assert [c["text"] for c in answer["choices"]] == ["hi there" + texts[0], "fox" + texts[1]]
    assert text_of(await stream(client, prompt="hi there", echo=True, max_tokens=1)) == "hi there" + texts[0]


async def test_echo_of_every_choice(client: httpx.AsyncClient, served: ServedModel):
    ids = served.tokenizer.encode_now("<|im_start|>fox")
    for fields, last in (({}, "fox"), ({"skip_special_tokens": False}, "<|im_start|>fox")):
        asked = {"prompt": ["hi there", ids], "echo": True, "n": 2, "max_tokens": 2} | fields
        answer, events = await complete(client, **asked), await stream(client, **asked)
        plain = await complete(client, **asked | {"echo": False})
        for choice, prompt in zip(answer["choices"], ["hi there"] * 2 + [last] * 2, strict=True):
            index = choice["index"]
            assert choice["text"] == prompt + plain["choices"][index]["text"] == text_of(events, index)


async def test_echo_alone_asks_no_worker(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    ids = served.tokenizer.encode_now("fox")
    for prompts, texts in (("hi there", ["hi there"]), (["hi there", ids], ["hi there", "fox"])):
        for n in (1, 2):
            asked = {"prompt": prompts, "echo": True, "max_tokens": 0, "n": n, "return_token_ids": True}
            answer = await complete(client, **asked)
            events = await stream(client, **asked, stream_options={"include_usage": True})
            expected = [text for text in texts for _ in range(n)]
            assert [choice["text"] for choice in answer["choices"]] == expected
            assert [text_of(events, index) for index in range(len(expected))] == expected
            for choice in (*answer["choices"], *(c for event in events for c in event["choices"])):
                assert (choice["finish_reason"], choice["token_ids"]) == ("length", [])
            num_prompt = sum(len(choice["prompt_token_ids"]) for choice in answer["choices"]) // n
            assert answer["usage"] == events[-1]["usage"]
            assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (num_prompt, 0)
    assert not backend.requests


async def test_the_space_between_prompt_and_answer(served: ServedModel, backend: FakeBackend):
    """Decoders as Llama 2's drop it at the start of a text, which an answer is not."""
    served = replace(served, tokenizer=LLAMA, vocab_size=LLAMA.vocab_size)
    ids = {LLAMA.token_name(index): index for index in range(LLAMA.vocab_size)}
    backend.reply = [ids["▁wörld"], ids["hello"]]
    transport = httpx.ASGITransport(create_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        prompt = [ids["▁hello"]]
        answer = await complete(client, prompt=prompt, max_tokens=2, logprobs=0)
        echo = await complete(client, prompt=prompt, max_tokens=2, echo=True)
    [choice] = answer["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (" wörldhello", [0, 6])
    assert echo["choices"][0]["text"] == "hello wörldhello"


async def test_a_token_that_the_model_lacks_is_refused(served: ServedModel, backend: FakeBackend):
    """Files may name more tokens than the model has rows for: an engine can't take their ids."""
    served = replace(served, vocab_size=served.tokenizer.vocab_size - 1)
    transport = httpx.ASGITransport(create_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        refused = await client.post("/v1/completions", json={"prompt": "a<tool call>b"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "token_id_out_of_range")
        await complete(client, prompt="a<tool>b")


async def test_every_sampling_field_reaches_the_backend(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "n": 3,
    }
    extra = {"seed": -1, "stop_token_ids": [9], "logit_bias": {"5": -100}, "priority": -3, "cache_salt": "s"}
    ignored = {"user": "u", "metadata": {}, "store": True, "best_of": 3, "tools": None, "never_heard_of": 1}
    await complete(client, **fields, **extra, **ignored, logprobs=1)
    request = backend.requests[0]
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert request.sampling.seed == 2**64 - 1
    assert request.sampling.stop_token_ids == (9, *served.eos_token_ids)
    assert request.sampling.logit_bias == ((5, -100.0),)
    assert (request.priority, request.cache_salt) == (-3, "s")
    await complete(client, top_k=-1)
    assert backend.requests[1].sampling.top_k == 0
    assert backend.requests[1].sampling.seed != 0


async def test_metrics_count_tokens(client: httpx.AsyncClient, backend: FakeBackend):
    await complete(client, prompt=[1, 2, 3], max_tokens=5)
    await client.get("/nowhere/at/all")
    text = (await client.get("/metrics")).text
    assert "baton_prompt_tokens_total 3.0" in text
    assert "baton_cached_prompt_tokens_total 2.0" in text
    assert "baton_generation_tokens_total 5.0" in text
    assert "baton_time_to_first_token_seconds_count 1.0" in text
    assert "baton_inter_token_latency_seconds_count 4.0" in text
    assert "baton_request_duration_seconds_count 1.0" in text
    assert 'baton_http_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
    assert 'baton_http_requests_total{endpoint="unmatched",status="404"} 1.0' in text
