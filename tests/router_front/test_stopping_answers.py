"""Stop strings in answers of /v1/completions: where the text ends, whole and streamed."""

from typing import Any

import httpx
import pytest

from baton_router.served_model import ServedModel
from baton_router.text.stop_strings import StopStrings
from tests.router_front.fake_backend import FakeBackend
from tests.router_front.test_completions import REPLY, complete, stream, text_of


async def test_stop_string_cuts_aborts_and_closes(client: httpx.AsyncClient, backend: FakeBackend):
    answer = await complete(client, stop=[" stop"], n=2, return_token_ids=True)
    assert [c["text"] for c in answer["choices"]] == ["hello world 🎉 the quick brown fox"] * 2
    assert [c["finish_reason"] for c in answer["choices"]] == ["stop", "stop"]
    request_id = backend.requests[0].request_id
    assert backend.aborted == [(request_id, 0), (request_id, 1)]
    assert backend.is_closed.is_set()
    num_tokens = sum(len(c["token_ids"]) for c in answer["choices"])
    assert answer["usage"]["completion_tokens"] == num_tokens


async def test_stop_strings_of_many_prompts_are_built_once(client: httpx.AsyncClient, monkeypatch):
    """They may be large."""
    added: list[str] = []
    add = StopStrings._add

    def count(self: StopStrings, string: str) -> None:
        added.append(string)
        add(self, string)

    monkeypatch.setattr(StopStrings, "_add", count)
    await complete(client, prompt=["x"] * 50, max_tokens=1, stop=["q" * 500])
    assert added == ["q" * 500]


async def test_tokens_after_the_stop_string_are_dropped(client: httpx.AsyncClient, backend: FakeBackend):
    one = await complete(client, stop=["quick"], return_token_ids=True)
    backend.tokens_per_delta = 7
    seven = await complete(client, stop=["quick"], return_token_ids=True)
    assert one["choices"] == seven["choices"]


async def test_min_tokens_puts_off_stop_strings(client: httpx.AsyncClient, backend: FakeBackend):
    cut = await complete(client, stop=["hello"], min_tokens=len(backend.reply) - 1)
    assert cut["choices"][0]["text"].startswith(REPLY)
    assert cut["choices"][0]["finish_reason"] == "stop"  # at the second hello


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"skip_special_tokens": False}])
async def test_a_stop_string_may_begin_within_min_tokens(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel, fields: dict[str, Any]
):
    backend.reply = served.tokenizer.encode_now("a b c d e")
    whole = (await complete(client, max_tokens=5, return_token_ids=True))["choices"][0]
    pieces = [served.tokenizer.decode([token_id]) for token_id in whole["token_ids"]]
    stop = pieces[1] + pieces[2] + pieces[3]
    for min_tokens in (0, 1, 2, 3):
        asked = fields | {"stop": stop, "min_tokens": min_tokens}
        answer = await complete(client, **asked)
        events = await stream(client, **asked)
        for choice in answer["choices"]:
            assert (choice["text"], choice["finish_reason"]) == (pieces[0], "stop")
            assert text_of(events, choice["index"]) == pieces[0]
    later = await complete(client, stop=stop, min_tokens=4, max_tokens=len(backend.reply))
    assert later["choices"][0]["text"] == "a b c d e"  # it ended too early


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"skip_special_tokens": False}, {"ignore_eos": True}])
@pytest.mark.parametrize("tokens_per_delta", [1, 4])
async def test_special_tokens_as_stop_strings(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    served: ServedModel,
    fields: dict[str, Any],
    tokens_per_delta: int,
):
    """They end the answer, though they are no part of its text."""
    backend.tokens_per_delta = tokens_per_delta
    backend.reply = served.tokenizer.encode_now("hello<|im_start|>world<|end|><|im_end|>fox")
    cases = {
        "<|im_start|>": "hello",
        "<|end|>": "helloworld",
        "lo<|im_start|>wor": "hel",
        "rld<|end|>": "hellowo",
    }
    for stop, expected in cases.items():
        asked = fields | {"stop": ["zzz", stop], "return_token_ids": True}
        answer = await complete(client, **asked)
        events = await stream(client, **asked)
        for choice in answer["choices"]:
            hidden = choice["text"].replace("<|im_start|>", "")
            assert (hidden, choice["finish_reason"]) == (expected, "stop")
            assert text_of(events, choice["index"]) == choice["text"]


async def test_a_stop_string_may_end_with_the_token_that_ends_the_answer(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = served.tokenizer.encode_now("hello<|im_end|>")
    for fields in ({}, {"skip_special_tokens": False}, {"min_tokens": len(backend.reply) - 1}):
        for stop, expected in (("lo<|im_end|>", "hel"), ("<|im_end|>", "hello"), ("<|im_end|>x", "hello")):
            [choice] = (await complete(client, stop=stop, **fields))["choices"]
            assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


async def test_special_tokens_that_no_stop_string_names_do_not_part_the_text(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = served.tokenizer.encode_now("hel<|im_start|>lo fox")
    answer = await complete(client, stop=["ello", "<|end|>"])
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("h", "stop")
