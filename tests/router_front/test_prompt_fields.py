"""What a request may say of how its prompt is made and cut, at both doors."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from baton.core.errors import InvalidRequest
from baton.front_config import FrontConfig
from baton.v1 import inference_pb2 as pb
from baton_router.grpc_front import InferenceServicer
from baton_router.http.app import create_app
from baton_router.served_model import ServedModel
from baton_router.text.chat_template import ChatTemplate
from tests.router_front.conftest import CHAT_TEMPLATE
from tests.router_front.fake_backend import FakeBackend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
SAID = pb.ChatMessage(role="user", content=USER["content"])
WORDS = "the quick brown fox jumps over the lazy dog"


async def post(client: httpx.AsyncClient, path: str, **fields: Any) -> httpx.Response:
    needed: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": WORDS}, CHAT: {"messages": [USER]}}
    return await client.post(path, json=needed.get(path, {}) | fields)


async def prompt_of(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, **fields: Any
) -> str:
    response = await post(client, CHAT, max_tokens=1, **fields)
    assert response.status_code == 200, response.text
    return served.tokenizer.decode(backend.requests[-1].token_ids, skip_special_tokens=False)


async def refused(client: httpx.AsyncClient, path: str, **fields: Any) -> tuple[str, str]:
    response = await post(client, path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("side", [None, "left", "right"])
async def test_prompts_are_cut(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, side: str | None
):
    whole = served.tokenizer.encode_now(WORDS)
    cut = {"truncation_side": side, "truncate_prompt_tokens": 5}
    expected = whole[:5] if side == "right" else whole[-5:]
    for prompt in (WORDS, whole):
        await post(client, COMPLETIONS, prompt=prompt, max_tokens=1, **cut)
        assert list(backend.requests[-1].token_ids) == expected
    await post(client, COMPLETIONS, max_tokens=1, **{**cut, "truncate_prompt_tokens": 100})
    assert list(backend.requests[-1].token_ids) == whole
    assert (await post(client, "/tokenize", prompt=WORDS, **cut)).json()["tokens"] == expected
    await prompt_of(client, served, backend, **cut)
    assert len(backend.requests[-1].token_ids) == 5
    servicer, sampling = InferenceServicer(served), pb.Sampling(max_tokens=1)
    asked: dict[str, Any] = {"truncate_prompt_tokens": 5, "truncation_side": side or ""}
    built, _ = await servicer._generation(pb.GenerateRequest(text=WORDS, sampling=sampling, **asked))
    assert list(built.token_ids) == expected
    tokens = await servicer.Tokenize(pb.TokenizeRequest(text=WORDS, **asked), None)  # type: ignore[arg-type]
    assert list(tokens.token_ids) == expected


@pytest.mark.parametrize(("fields", "num_left"), [({"max_tokens": 40}, 40), ({}, 16)])
async def test_prompts_are_cut_to_what_the_model_takes(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], num_left: int
):
    """However long they are."""
    for prompt in ([5] * 1000, "hello wörld " * 1300):
        response = await post(client, COMPLETIONS, prompt=prompt, truncate_prompt_tokens=-1, **fields)
        assert response.status_code == 200, response.text
        [length, max_tokens] = len(backend.requests[-1].token_ids), backend.requests[-1].sampling.max_tokens
        assert (length, max_tokens) == (backend.max_model_len - num_left, num_left)
    many = [{"role": "user", "content": "hello " * 500}]
    assert (await post(client, CHAT, messages=many, truncate_prompt_tokens=-1)).status_code == 200
    assert len(backend.requests[-1].token_ids) == backend.max_model_len - 1
    counted = (await post(client, "/tokenize", prompt="x " * 500, truncate_prompt_tokens=-1)).json()
    assert counted["count"] == backend.max_model_len


async def test_the_echo_of_a_cut_prompt_is_what_is_left(client: httpx.AsyncClient, served: ServedModel):
    fields = {"echo": True, "max_tokens": 1, "truncate_prompt_tokens": 3}
    [choice] = (await post(client, COMPLETIONS, **fields)).json()["choices"]
    assert choice["text"].startswith(served.tokenizer.decode(served.tokenizer.encode_now(WORDS)[-3:]))


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": -2}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": "5"}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 217, "max_tokens": 40}),
        ("truncation_side", {"truncate_prompt_tokens": 5, "truncation_side": "middle"}),
        ("truncation_side", {"truncation_side": "middle"}),
    ],
)
async def test_cuts_that_make_no_sense(client: httpx.AsyncClient, param: str, fields: dict[str, Any]):
    for path in (COMPLETIONS, CHAT):
        assert (await refused(client, path, **fields))[0] == param


LLAMA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for part in m.content %}{{ part.text }}{% endfor %}[end]{% endfor %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA, PARTS])
@pytest.mark.parametrize("content", ["Once upon", " Once upon  ", "Once\nupon\n\n", "hi"])
def test_a_continued_message_is_as_in_transformers(template: str, content: str):
    final: dict[str, Any] = {"role": "assistant", "content": content}
    ours = ChatTemplate(template, {}).render(
        [USER, final], add_generation_prompt=False, continue_final_message=True
    )
    theirs = [USER, final]
    if template is PARTS:
        theirs = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in theirs]
    rendered: Any = render_jinja_template([theirs], chat_template=template, continue_final_message=True)
    assert ours == rendered[0][0]
    assert ours.rstrip().endswith(content.strip())


async def test_continued_messages_at_the_doors(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
):
    messages = [USER, {"role": "assistant", "content": "Once"}]
    fields = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nOnce"
    assert await prompt_of(client, served, backend, **fields) == expected
    chat = pb.ChatMessages(
        messages=[pb.ChatMessage(role=message["role"], content=message["content"]) for message in messages],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert InferenceServicer(served)._render(chat) == expected
    both = {"messages": messages, "continue_final_message": True}
    for more in ({}, {"add_generation_prompt": True}):
        param, message = await refused(client, CHAT, **both, **more)
        assert param == "continue_final_message"
        assert "add_generation_prompt: false" in message


@pytest.mark.parametrize(
    ("template", "content"),
    [(PARTS, []), ("{{ messages[0].content }}", "x"), ("{{ messages | length }}", "x")],
)
def test_messages_that_can_not_be_continued(template: str, content: Any):
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        ChatTemplate(template, {}).render(
            [USER, {"role": "assistant", "content": content}],
            add_generation_prompt=False,
            continue_final_message=True,
        )


@pytest.fixture
def trusting(served: ServedModel) -> ServedModel:
    return replace(served, front=FrontConfig(trust_request_chat_template=True))


@pytest.fixture
def trusting_client(trusting: ServedModel) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(trusting)), base_url="http://baton")


async def test_templates_of_requests(
    client: httpx.AsyncClient, trusting: ServedModel, trusting_client: httpx.AsyncClient, backend: FakeBackend
):
    own = "{{ messages[0].content }}!{{ eos_token }}"
    param, message = await refused(client, CHAT, chat_template=own)
    assert param == "chat_template"
    assert "--trust-request-chat-template" in message
    async with trusting_client as trusted:
        for _ in range(2):
            assert await prompt_of(trusted, trusting, backend, chat_template=own) == "hi!<|im_end|>"
        tokenized = await post(trusted, "/tokenize", messages=[USER], chat_template="x")
        assert tokenized.json()["tokens"] == trusting.tokenizer.encode_now("x")
    assert trusting.tokenizer._request_template.cache_info().hits >= 1
    with pytest.raises(InvalidRequest):
        InferenceServicer(replace(trusting, front=FrontConfig()))._render(
            pb.ChatMessages(messages=[SAID], chat_template=own)
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ x | nothing_known }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}{{ messages.append(1) }}",
        "{{ messages.nothing.more }}",
        "{{ 'x' * 10**15 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "x" * 70_000,
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    ],
    ids=lambda template: template[:30],
)
async def test_broken_templates_of_requests(trusting_client: httpx.AsyncClient, template: str):
    async with trusting_client as trusted:
        param, message = await refused(trusted, CHAT, chat_template=template)
    assert param in ("chat_template", "messages")
    assert "request" in message or "characters" in message


VARIABLES = "{{ documents[0].text }} {{ reasoning_effort }} {{ enable_thinking }} {{ mood }}"


async def test_variables_of_templates(
    trusting_client: httpx.AsyncClient, trusting: ServedModel, backend: FakeBackend
):
    fields = {"chat_template": VARIABLES, "documents": [{"title": "T", "text": "facts"}]}
    kwargs = {"mood": "good", "reasoning_effort": "low", "documents": []}
    async with trusting_client as trusted:
        asked = {**fields, "chat_template_kwargs": kwargs}
        high = await prompt_of(trusted, trusting, backend, **asked, reasoning_effort="high")
        none = await prompt_of(trusted, trusting, backend, **asked, reasoning_effort="none")
        left_out = await prompt_of(trusted, trusting, backend, **asked)
    assert (high, none) == ("facts high True good", "facts none False good")
    assert left_out == "facts low  good"
    chat = pb.ChatMessages(
        messages=[SAID],
        chat_template=VARIABLES,
        documents=json.dumps(fields["documents"]),
        reasoning_effort="high",
        chat_template_kwargs=json.dumps(kwargs),
    )
    assert InferenceServicer(trusting)._render(chat) == high


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("documents", {"documents": "{}"}),
        ("documents", {"documents": "["}),
        ("chat_template_kwargs", {"chat_template_kwargs": "[]"}),
        ("reasoning_effort", {"reasoning_effort": "great"}),
    ],
)
def test_bad_json_of_grpc(served: ServedModel, param: str, fields: dict[str, Any]):
    with pytest.raises(InvalidRequest) as error:
        InferenceServicer(served)._render(pb.ChatMessages(messages=[SAID], **fields))
    assert error.value.param == param
