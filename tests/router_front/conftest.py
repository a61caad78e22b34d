"""A small byte-level tokenizer, a deterministic backend and the doors over them."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import httpx
import pytest
import tokenizers
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from baton_router.http.app import create_app
from baton_router.http.server import HttpServer
from baton_router.metrics import FrontMetrics
from baton_router.served_model import ChatFormats, ServedModel
from baton_router.structured_outputs import FormatChecks
from baton_router.text.tokenizer import Tokenizer
from tests.router_front.fake_backend import MODEL, FakeBackend

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.name == 'bad' %}{{ raise_exception('No name bad.') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ extra }}"
)
_TEXTS = ["hello world the quick brown fox jumps over the lazy dog stop here", "héllo wörld 日本語 ünïcode"]


def train_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: characters that the texts lack, such as emoji, take several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 20, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


def write_model(directory: Path, template: str | None = CHAT_TEMPLATE) -> Path:
    """A model directory as far as tokenizers go."""
    train_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(tokenizer.encode_now("hello world 🎉 the quick brown fox stop here"))


@pytest.fixture
def served(backend: FakeBackend, tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        backend=backend,
        tokenizer=tokenizer,
        model=MODEL,
        root="/models/tiny",
        version="0.1.0",
        created=1700000000,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
        formats=FormatChecks("auto"),
        chat=ChatFormats(),
        metrics=FrontMetrics(CollectorRegistry()),
    )


@pytest.fixture
async def client(served: ServedModel) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(served, max_body_bytes=20_000), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as made:
        yield made


@pytest.fixture
async def base_url(served: ServedModel) -> AsyncGenerator[str]:
    """The base URL of a real uvicorn."""
    server = HttpServer(create_app(served))
    listener = socket.create_server(("127.0.0.1", 0))  # early connections wait in the backlog
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()
