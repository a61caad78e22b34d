"""What the options of the front doors change."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.config import RouterConfig
from baton.core.errors import InvalidRequest, StartupError
from baton.core.sampling import SamplingParams
from baton.front_config import FrontConfig
from baton.generation_defaults import GenerationDefaults, generation_defaults
from baton.option_values import JSON_STRINGS
from baton.v1 import inference_pb2 as pb
from baton_router.grpc_front import InferenceServicer
from baton_router.http.app import create_app
from baton_router.http.server_info import shown_options
from baton_router.served_model import ServedModel
from tests.router_front.conftest import CHAT_TEMPLATE
from tests.router_front.fake_backend import FakeBackend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
}
RECOMMENDED = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "max_new_tokens": 7,
}


def client_of(served: ServedModel, front: FrontConfig | None = None, **more: Any) -> httpx.AsyncClient:
    app = create_app(replace(served, front=front or FrontConfig()), **more)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://baton")


def folder_with(directory: Path, config: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_defaults_of_a_checkpoint(tmp_path: Path):
    model = folder_with(tmp_path, RECOMMENDED | {"eos_token_id": 1, "do_sample": True, "top_p": None})
    fields = {name: value for name, value in RECOMMENDED.items() if name not in ("top_p", "max_new_tokens")}
    found = generation_defaults(model, "auto", {})
    assert found.fields == fields | {"max_tokens": 7}
    assert "temperature 0.6" in found.text()
    assert str(tmp_path) in found.text()
    for none in ("baton", "vllm"):
        assert generation_defaults(model, none, {}).fields == {}
    changed = generation_defaults(model, "auto", {"temperature": 0, "top_k": None, "max_new_tokens": 3})
    assert changed.fields["temperature"] == 0
    assert changed.fields["max_tokens"] == 3
    assert "top_k" not in changed.fields
    assert generation_defaults(model, "baton", {"top_k": -1}).fields == {"top_k": -1}


def test_defaults_of_a_folder(tmp_path: Path):
    (tmp_path / "model").mkdir()
    folder_with(tmp_path, RECOMMENDED)
    assert generation_defaults(tmp_path / "model", "auto", {}) == GenerationDefaults()
    assert generation_defaults(tmp_path / "model", str(tmp_path), {}).fields["top_k"] == 20
    with pytest.raises(StartupError, match="there is no generation_config"):
        generation_defaults(tmp_path, str(tmp_path / "model"), {})


@pytest.mark.parametrize(
    "config",
    [{"temperature": "hot"}, {"temperature": -1}, {"top_k": 2.5}, {"top_p": True}, {"max_new_tokens": 0}],
)
def test_defaults_that_no_request_could_have(tmp_path: Path, config: dict[str, Any]):
    with pytest.raises(StartupError):
        generation_defaults(folder_with(tmp_path, config), "auto", {})
    with pytest.raises(StartupError):
        generation_defaults(tmp_path, "baton", config)
    with pytest.raises(StartupError, match="there are temperature"):
        generation_defaults(tmp_path, "baton", {"num_beams": 2})


@pytest.fixture
def recommending(served: ServedModel, tmp_path: Path) -> ServedModel:
    return replace(served, defaults=generation_defaults(folder_with(tmp_path, RECOMMENDED), "auto", {}))


def sampled(params: SamplingParams) -> dict[str, Any]:
    names = {name: name for name in RECOMMENDED} | {"max_new_tokens": "max_tokens"}
    return {name: getattr(params, field) for name, field in names.items()}


async def test_defaults_hold_where_requests_leave_them_out(recommending: ServedModel, backend: FakeBackend):
    chosen = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    async with client_of(recommending) as client:
        for path in (COMPLETIONS, CHAT):
            await client.post(path, json=BODIES[path] | {"temperature": None})
            assert sampled(backend.requests[-1].sampling) == RECOMMENDED
            await client.post(path, json=BODIES[path] | chosen | {"max_tokens": 9})
            assert sampled(backend.requests[-1].sampling) == chosen | {"max_new_tokens": 9}
    servicer = InferenceServicer(recommending)
    built, _ = await servicer._generation(pb.GenerateRequest(text="x"))
    assert sampled(built.sampling) == RECOMMENDED
    built, _ = await servicer._generation(pb.GenerateRequest(text="x", sampling=pb.Sampling(top_k=0)))
    assert sampled(built.sampling) == RECOMMENDED | {"top_k": 0}


@pytest.mark.parametrize("most", [0, 3, 50])
async def test_most_logprobs(served: ServedModel, backend: FakeBackend, most: int):
    async with client_of(served, FrontConfig(max_logprobs=most)) as client:
        for count, status in ((most, 200), (most + 1, 400)):
            plain = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | {"logprobs": count})
            chat = {"logprobs": True, "top_logprobs": count}
            answer = await client.post(CHAT, json=BODIES[CHAT] | chat | {"max_tokens": 1})
            assert (plain.status_code, answer.status_code) == (status, status)
        assert plain.json()["error"]["param"] == "logprobs"
        assert answer.json()["error"]["param"] == "top_logprobs"
    request = pb.GenerateRequest(text="x", sampling=pb.Sampling(logprobs=most + 1))
    with pytest.raises(InvalidRequest, match="logprobs"):
        await InferenceServicer(replace(served, front=FrontConfig(max_logprobs=most)))._generation(request)


ORIGIN = {"Origin": "https://page.example"}
PREFLIGHT = ORIGIN | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-mine"}


async def test_pages_of_other_origins(served: ServedModel):
    async with client_of(served) as client:
        assert (await client.options(COMPLETIONS, headers=PREFLIGHT)).status_code == 405
        plain = await client.get("/v1/models", headers=ORIGIN)
        assert "access-control-allow-origin" not in plain.headers
    async with client_of(served, FrontConfig(allowed_origins=("*",))) as client:
        assert (await client.options(COMPLETIONS, headers=PREFLIGHT)).status_code == 200
        answer = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers=ORIGIN)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    some = FrontConfig(
        allowed_origins=("https://page.example",),
        allowed_methods=("GET",),
        allowed_headers=("x-yours",),
        allow_credentials=True,
    )
    async with client_of(served, some) as client:
        refused = await client.options(COMPLETIONS, headers=PREFLIGHT)
        assert refused.status_code == 400
        assert "method" in refused.text
        assert "headers" in refused.text
        other = await client.get("/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        allowed = await client.get("/v1/models", headers=ORIGIN)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert allowed.headers["access-control-allow-credentials"] == "true"
        failed = await client.get("/nothing", headers=ORIGIN)
        assert failed.headers["access-control-allow-origin"] == "https://page.example"


async def test_a_path_before_the_api(served: ServedModel):
    async with client_of(served, FrontConfig(root_path="/llm")) as client:
        for path in ("/llm/v1/models", "/v1/models"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/openapi.json")).json()["servers"] == [{"url": "/llm"}]
        for path in ("/llm/v1/messages", "/v1/messages"):
            assert (await client.post(path, json={})).json()["type"] == "error", "Anthropic's shape"


async def test_load(client: httpx.AsyncClient, backend: FakeBackend):
    assert (await client.get("/load")).json() == {"server_load": 0}
    backend.hang_after = 0
    running = asyncio.create_task(client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | {"prompt": ["a", "b"]}))
    await asyncio.wait_for(backend.is_hanging.wait(), 10)
    assert (await client.get("/load")).json() == {"server_load": 2}
    backend.may_go_on.set()
    await running
    assert (await client.get("/load")).json() == {"server_load": 0}


async def test_information_is_there_where_it_is_asked_for(served: ServedModel):
    async with client_of(served) as client:
        for path in ("/tokenizer_info", "/server_info"):
            assert (await client.get(path)).status_code == 404
    front = FrontConfig(
        enable_tokenizer_info_endpoint=True, enable_server_info=True, allowed_origins=("https://a",)
    )
    config = RouterConfig(Path("/m"), ("m",), worker_addresses=("w:1",), cluster_token="hidden", front=front)
    async with client_of(served, front, options=shown_options(config)) as client:
        info = (await client.get("/tokenizer_info")).json()
        assert info["chat_template"] == CHAT_TEMPLATE
        assert info["eos_token"] == "<|im_end|>"
        response = await client.get("/server_info")
    assert "hidden" not in response.text
    options = response.json()["options"]
    assert options["worker_addresses"] == ["w:1"]
    assert options["model_dir"] == "/m"
    assert options["allowed_origins"] == ["https://a"]
    assert "cluster_token" not in options


async def test_the_prefix_cache_is_reset_where_developers_may(served: ServedModel, backend: FakeBackend):
    async with client_of(served) as client:
        assert (await client.post("/reset_prefix_cache")).status_code == 404
    async with client_of(served, FrontConfig(enable_dev_endpoints=True)) as client:
        assert (await client.post("/reset_prefix_cache")).status_code == 200
    assert backend.num_resets == 1


async def test_a_suffix_is_refused_with_the_reason(client: httpx.AsyncClient):
    response = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | {"suffix": "x"})
    assert response.status_code == 400
    assert "fill in the middle" in response.json()["error"]["message"]


@pytest.mark.parametrize("written", ["*", '{"a": 1}', "[1]", "[", '"*"'])
def test_what_is_no_list_of_strings(written: str):
    with pytest.raises(StartupError, match="JSON list"):
        JSON_STRINGS.read(written)


@pytest.mark.parametrize(
    "fields",
    [
        {"override_generation_config": "[]"},
        {"override_generation_config": "{"},
        {"max_logprobs": 1025},
        {"max_logprobs": -1},
        {"root_path": "llm"},
        {"root_path": "/llm/"},
    ],
)
def test_options_that_make_no_sense(fields: dict[str, Any]):
    with pytest.raises(StartupError):
        FrontConfig(**fields)
