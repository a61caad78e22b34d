"""What a request may say of how its answer ends and is written, at both doors."""

import random
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest
from baton.v1 import inference_pb2 as pb
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from baton_router.text.detokenizer import UnspacedDetokenizer, WindowDetokenizer
from baton_router.text.repetition import Repetition, RepetitionDetector
from baton_router.text_delta import TextDelta, joined
from baton_router.text_stream import generate_text
from tests.router_front.fake_backend import FakeBackend
from tests.router_front.test_completions import complete, stream

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}


async def over_grpc(served: ServedModel, **sampling: Any) -> TextDelta:
    request = pb.GenerateRequest(text="hi", sampling=pb.Sampling(max_tokens=60, **sampling))
    built, _ = await InferenceServicer(served)._generation(request)
    return joined([delta async for delta in generate_text(served, built)])


def ending(choice: dict[str, Any]) -> tuple[Any, ...]:
    return choice["text"], choice["finish_reason"], choice["stop_reason"]


async def ends(client: httpx.AsyncClient, **fields: Any) -> tuple[Any, ...]:
    """Text, finish_reason and stop_reason, the same streamed, whole and in chat."""
    [choice] = (await complete(client, **fields))["choices"]
    pieces = [piece for event in await stream(client, **fields) for piece in event["choices"]]
    text = "".join(piece["text"] for piece in pieces)
    assert ending(pieces[-1] | {"text": text}) == ending(choice)
    assert all(piece["stop_reason"] is None for piece in pieces[:-1])
    chat = (await client.post("/v1/chat/completions", json=CHAT | fields)).json()["choices"][0]
    assert ending(chat | {"text": chat["message"]["content"]}) == ending(choice)
    return ending(choice)


@pytest.mark.parametrize("tokens_per_delta", [1, 4])
async def test_stop_reason_and_the_stop_in_the_text(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel, tokens_per_delta: int
):
    backend.tokens_per_delta = tokens_per_delta
    included = {"include_stop_str_in_output": True}
    assert await ends(client, stop=["zz", "lo w"]) == ("hel", "stop", "lo w")
    assert await ends(client, stop=["zz", "lo w"], **included) == ("hello w", "stop", "lo w")
    [third] = backend.reply[2:3]
    cut, whole = served.tokenizer.decode(backend.reply[:2]), served.tokenizer.decode(backend.reply[:3])
    assert await ends(client, stop_token_ids=[third]) == (cut, "stop", third)
    assert await ends(client, stop_token_ids=[third], **included) == (whole, "stop", third)
    assert (await ends(client, max_tokens=5))[1:] == ("length", None)
    answer = await over_grpc(served, stop=["lo w"], include_stop_str_in_output=True)
    assert (answer.text, answer.stop_reason) == ("hello w", "lo w")


async def test_the_models_own_end_is_no_stop_reason(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    [end] = served.eos_token_ids
    backend.reply = [*served.tokenizer.encode_now("fox"), end]
    included = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert await ends(client) == ("fox", "stop", None)
    assert await ends(client, stop_token_ids=[end]) == ("fox", "stop", None)
    assert await ends(client, stop_token_ids=[end], ignore_eos=True) == ("fox", "stop", end)
    assert await ends(client, **included) == ("fox<|im_end|>", "stop", None)
    assert await ends(client, include_stop_str_in_output=True) == ("fox", "stop", None)
    assert await ends(client, stop="x<|im_end|>", **included) == ("fox<|im_end|>", "stop", "x<|im_end|>")


async def test_hidden_special_tokens_of_an_included_stop_string(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = served.tokenizer.encode_now("hello<|im_start|>world")
    expected = ("hello<|im_start|>wor", "stop", "lo<|im_start|>wor")
    assert await ends(client, stop="lo<|im_start|>wor", include_stop_str_in_output=True) == expected


async def test_bytes_of_logprobs_are_the_text_with_its_end(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = [*served.tokenizer.encode_now("fox"), *served.eos_token_ids]
    fields = {"include_stop_str_in_output": True, "skip_special_tokens": False, "logprobs": True}
    answer = (await client.post("/v1/chat/completions", json=CHAT | fields)).json()["choices"][0]
    spelled = bytes(byte for entry in answer["logprobs"]["content"] for byte in entry["bytes"])
    assert spelled.decode() == answer["message"]["content"] == "fox<|im_end|>"


async def test_tokens_by_their_ids(client: httpx.AsyncClient, backend: FakeBackend):
    names = [f"token_id:{token_id}" for token_id in backend.reply[:3]]
    fields: dict[str, Any] = {"return_tokens_as_token_ids": True, "max_tokens": 3}
    logprobs = (await complete(client, logprobs=1, **fields))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == names
    assert all(name in top for name, top in zip(names, logprobs["top_logprobs"], strict=True))
    chat = CHAT | fields | {"logprobs": True, "top_logprobs": 1}
    content = (await client.post("/v1/chat/completions", json=chat)).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert [entry["token"] for entry in content] == names
    assert [entry["top_logprobs"][0]["token"] for entry in content] == names


def first_repetition(token_ids: Sequence[int], repetition: Repetition) -> int | None:
    """By looking at all tokens so far at every token, as vLLM's scheduler does."""
    smallest = max(1, repetition.min_pattern_size)
    for end in range(1, len(token_ids) + 1):
        for size in range(smallest, repetition.max_pattern_size + 1):
            tail = token_ids[max(0, end - size * repetition.min_count) : end]
            if (
                len(tail) == size * repetition.min_count
                and list(tail) == list(tail[:size]) * repetition.min_count
            ):
                return end
    return None


@pytest.mark.parametrize("sizes", [(1, 0, 2), (3, 0, 2), (3, 2, 3), (5, 5, 2), (8, 3, 2), (40, 1, 3)])
def test_a_repetition_is_found_where_looking_back_finds_it(sizes: tuple[int, int, int]):
    repetition, draw = Repetition(*sizes), random.Random(5)
    found = set()
    for _ in range(200):
        token_ids = [draw.randrange(3) for _ in range(60)]
        detector = RepetitionDetector(repetition)
        end = next((i for i, token_id in enumerate(token_ids, 1) if detector.push(token_id)), None)
        assert end == first_repetition(token_ids, repetition)
        found.add(end)
    assert len(found) > 1 or None in found


async def test_a_repetition_ends_the_answer(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel
):
    backend.reply = served.tokenizer.encode_now("abc")
    assert len(backend.reply) == 3
    detection = {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3}
    for tokens_per_delta in (1, 7):
        backend.tokens_per_delta = tokens_per_delta
        expected = ("abcabcabc", "repetition", "repetition_detected")
        assert await ends(client, repetition_detection=detection) == expected
        assert backend.aborted[-1] == (backend.requests[-1].request_id, 0)
    assert (await ends(client, repetition_detection=detection, max_tokens=9))[1] == "length"
    assert (await ends(client, repetition_detection=detection, stop="cabc", max_tokens=9))[1] == "stop"
    late = await ends(client, repetition_detection=detection, min_tokens=11)
    assert late[:2] == ("abcabcabcab", "repetition")
    assert (await ends(client, repetition_detection={}))[1] == "length"
    answer = await over_grpc(served, repetition_detection=detection)
    assert (answer.text, answer.stop_reason) == ("abcabcabc", "repetition_detected")


@pytest.mark.parametrize(
    ("param", "detection"),
    [
        ("repetition_detection.min_count", {"max_pattern_size": 4, "min_count": 1}),
        ("repetition_detection.max_pattern_size", {"max_pattern_size": 1, "min_pattern_size": 2}),
        ("repetition_detection.max_pattern_size", {"max_pattern_size": 1025, "min_count": 2}),
        ("repetition_detection.max_pattern_size", {"min_pattern_size": -1}),
        ("repetition_detection.min_count", {"max_pattern_size": 4, "min_count": "3"}),
    ],
)
async def test_repetitions_that_make_no_sense(
    client: httpx.AsyncClient, param: str, detection: dict[str, Any]
):
    response = await client.post("/v1/completions", json={"prompt": "x", "repetition_detection": detection})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    if detection.get("min_count") != "3":
        with pytest.raises(InvalidRequest):
            Repetition(**detection)


def test_added_tokens_without_spaces_between():
    """As with decoders that join tokens by spaces."""
    words = {1: "one", 2: "<a>", 3: "<b>"}
    added = {2: "<a>", 3: "<b>"}

    def text_of(token_ids: Sequence[int], spaced: bool) -> str:
        window = WindowDetokenizer(
            lambda ids: " ".join(words[token_id] for token_id in ids), lambda _: True, lambda _: None
        )
        detokenizer = window if spaced else UnspacedDetokenizer(window, added)
        spelled = b""
        text = ""
        for token_id in token_ids:
            spelled += detokenizer.bytes_of(token_id)
            text += detokenizer.push(token_id)
        assert spelled.decode() == text
        return text + detokenizer.flush()

    assert text_of([1, 2, 3, 1, 2], spaced=True) == "one <a> <b> one <a>"
    assert text_of([1, 2, 3, 1, 2], spaced=False) == "one <a><b> one <a>"


async def test_spaces_between_special_tokens_reach_the_text(client: httpx.AsyncClient, backend: FakeBackend):
    await complete(client, spaces_between_special_tokens=False)
    await complete(client)
    assert [r.text.spaces_between_special_tokens for r in backend.requests] == [False, True]
