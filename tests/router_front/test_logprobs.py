"""Tokens of logprobs, joined, are the text, for every kind of tokenizer."""

import itertools
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from baton.core.sampling import SampledToken, SamplingParams
from baton.tokenizer.backend import TokenizerFiles
from baton_router.http.app import create_app
from baton_router.served_model import ServedModel
from baton_router.text.tokenizer import Tokenizer
from tests.router_front import fake_backend
from tests.router_front.fake_backend import FakeBackend
from tests.router_front.test_detokenizer import GEMMA, LLAMA

WORDS = [
    *("<unk>", "<s>", "</s>", "▁hello", "▁world", "hello", "▁", "日", "##ing", "x"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def words_tokenizer(decoder: decoders.Decoder | None) -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return Tokenizer(TokenizerFiles(backend, {"bos_token": "<s>", "eos_token": "</s>"}, TEMPLATE))


KINDS = {
    "llama": LLAMA,
    "gemma": GEMMA,
    "metaspace": words_tokenizer(decoders.Metaspace()),
    "metaspace, bytes": words_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace, no first space": words_tokenizer(decoders.Metaspace(prepend_scheme="never")),
    "word pieces": words_tokenizer(decoders.WordPiece(cleanup=False)),
    "no decoder": words_tokenizer(None),
}
REPLIES = [
    ["▁hello", "▁world", "hello", "▁", "日"],
    ["▁", "▁hello", "x", "▁world", "▁", "▁"],
    ["日", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "▁world", "<0x20>", "<0x41>", "hello"],
    ["<s>", "▁hello", "<s>", "▁world", "hello", "</s>"],
]


def ids_of(tokenizer: Tokenizer, names: list[str]) -> list[int]:
    ids = {tokenizer.token_name(index): index for index in range(tokenizer.vocab_size)}
    return [ids[name] for name in names if name in ids]


async def choices_of(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    """The choices of a whole answer, and of a stream, a list of pieces for each."""
    pieces: list[list[dict[str, Any]]] = []
    for stream in (False, True):
        response = await client.post(path, json=body | {"stream": stream})
        assert response.status_code == 200, response.text
        events = (
            [response.text] if not stream else response.text.removesuffix("data: [DONE]\n\n").split("\n\n")
        )
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event]
        for index in range(2):
            pieces.append([c for chunk in chunks for c in chunk["choices"] if c["index"] == index])
    return pieces


@pytest.mark.parametrize("prompt", [["<s>"], ["<s>", "▁hello"], ["hello"]], ids=" ".join)
@pytest.mark.parametrize("name", KINDS)
async def test_joined_they_are_the_text(
    served: ServedModel, backend: FakeBackend, name: str, prompt: list[str]
):
    tokenizer = KINDS[name]
    served = replace(
        served, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids
    )
    transport = httpx.ASGITransport(create_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        for reply, skip in itertools.product(REPLIES, (True, False)):
            backend.reply = ids_of(tokenizer, reply)
            body = {"prompt": ids_of(tokenizer, prompt), "n": 2, "logprobs": 2}
            asked = body | {"max_tokens": len(backend.reply), "skip_special_tokens": skip}
            for choice in await choices_of(client, "/v1/completions", asked):
                text = "".join(piece["text"] for piece in choice)
                special = {"<unk>", "<s>", "</s>"} if skip else {"</s>"}
                tokens = [token for piece in choice for token in piece["logprobs"]["tokens"]]
                assert joined([token for token in tokens if token not in special]) == text.encode()
                assert len(tokens) == len(backend.reply)


def joined(tokens: list[str]) -> bytes:
    """Tokens as OpenAI spells them, as the bytes of their text."""
    pieces = [
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in tokens
    ]
    return b"".join(pieces)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("llama", "gemma")])
async def test_bytes_of_a_chat_are_those_of_its_text(served: ServedModel, backend: FakeBackend, name: str):
    """The prompt is <s> alone, so that the first token's space is dropped where a decoder drops it."""
    tokenizer = KINDS[name]
    served = replace(
        served, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids
    )
    body = {"messages": [{"role": "user", "content": ""}], "n": 2, "logprobs": True, "top_logprobs": 1}
    transport = httpx.ASGITransport(create_app(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        for reply in REPLIES:
            backend.reply = ids_of(tokenizer, reply)
            asked = body | {"max_tokens": len(backend.reply)}
            for choice in await choices_of(client, "/v1/chat/completions", asked):
                text = "".join(part.get("message", part.get("delta")).get("content", "") for part in choice)
                entries = [e for part in choice for e in (part["logprobs"] or {"content": []})["content"]]
                assert bytes(byte for entry in entries for byte in entry["bytes"]) == text.encode()
                assert len(entries) == len(backend.reply)
                assert [e["top_logprobs"][0]["bytes"] for e in entries] == [e["bytes"] for e in entries]
                assert not any(e["bytes"] for e in entries if e["token"] in ("<s>", "</s>"))


async def test_of_equal_texts_the_likelier_stays(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    served: ServedModel,
    monkeypatch: pytest.MonkeyPatch,
):
    """Two tokens may have one text: a word of the vocabulary, and an added token of the same letters."""
    tokenizer = served.tokenizer
    texts = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    word = next(index for index in range(300, tokenizer.vocab_size) if len(texts[index]) > 2)
    monkeypatch.setitem(tokenizer._bytes, 299, texts[word])
    for chosen, other in ((word, 299), (299, word)):
        token = SampledToken(chosen, -3.0, ((other, -0.5), (chosen, -3.0)))

        def sampled(params: SamplingParams, token_id: int, token: SampledToken = token) -> SampledToken:
            return token

        monkeypatch.setattr(fake_backend, "_sampled", sampled)
        for answer in await choices_of(
            client, "/v1/completions", {"prompt": "hi", "n": 2, "logprobs": 2, "max_tokens": 1}
        ):
            [logprobs] = [piece["logprobs"] for piece in answer]
            assert logprobs["top_logprobs"] == [{texts[word].decode(): -0.5}]
            assert logprobs["token_logprobs"] == [-3.0]
