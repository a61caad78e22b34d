"""Conversations as templates of real models take them, against transformers."""

import json
from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest
from baton_router.http.app import create_app
from baton_router.served_model import ServedModel
from baton_router.text.chat_template import ChatTemplate
from tests.router_front.conftest import train_tokenizer
from tests.router_front.fake_backend import FakeBackend

TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
QWEN_2_5 = """{%- for message in messages %}
    {%- if message.role in ("user", "system") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN_3 = """{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string and not message.content.startswith('<t') %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content + '\\n</think>\\n' + content }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""
SMOL_VLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]"
    "['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "{% set image_count.value = image_count.value + 1 %}<|image_pad|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
)
PARTS = {
    "SmolVLM": SMOL_VLM,
    "LLaVA": LLAVA,
    "attribute": "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}",
    "a name first": (
        "{% set ms = messages[1:] if false else messages %}{% for m in ms %}{% set content = m['content'] %}"
        "{% for p in content %}{{ p['text'] }}|{% endfor %}{% endfor %}"
    ),
    "get": "{% for m in messages %}{% for p in m.get('content') or [] %}{{ p.text }}{% endfor %}{% endfor %}",
    "a macro": (
        "{% macro show(parts, end='|') %}{% for p in parts %}{{ p.text }}{{ end }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}"
    ),
    "a macro of messages": (
        "{% macro show(m) %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endmacro %}"
        "{% for message in messages %}{{ show(m=message) }}{% endfor %}"
    ),
    "a namespace": (
        "{% set ns = namespace(c=[]) %}{% for m in messages %}{% set ns.c = m.content %}"
        "{% for p in ns.c %}{{ p.text }}|{% endfor %}{% endfor %}"
    ),
    "an index": "{% for m in messages %}{{ m.content[0].text }}|{% endfor %}",
    "map": "{% for m in messages %}{{ m.content | map(attribute='text') | join('+') }}|{% endfor %}",
    "with": "{% for m in messages %}{% with c = m.content %}{{ c[0]['text'] }}|{% endwith %}{% endfor %}",
    "first": "{% for p in (messages | first).content %}{{ p.text }}|{% endfor %}",
    "a condition": (
        "{% for m in messages %}{% set c = m.content if m.content else [] %}"
        "{% for p in c %}{{ p['text'] }}|{% endfor %}{% endfor %}"
    ),
}
STRINGS = {
    "ChatML": CHATML,
    "Llama 3": LLAMA_3,
    "Qwen2.5": QWEN_2_5,
    "Qwen3": QWEN_3,
    "lines of a string": (
        "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}|{% endfor %}{% endfor %}"
    ),
    "another content in a macro": (
        "{% macro show(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
        "{{ show([1, 2]) }}{% for m in messages %}{% set content = m.content %}{{ content }}|{% endfor %}"
    ),
    "a part of a string": "{% for m in messages %}{{ m.content[1:] }}{{ m.content[0] }}|{% endfor %}",
}
TEXT = "Grüße 🎉\nzwei"
TWO_PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


def conversation(content: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Ja"},
        {"role": "user", "content": "x"},
    ]


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every content as a list."""
    return [
        {
            **m,
            "content": [{"type": "text", "text": m["content"]}]
            if isinstance(m["content"], str)
            else m["content"],
        }
        for m in messages
    ]


def by_transformers(source: str, messages: list[dict[str, Any]]) -> str:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), **TOKENS)
    text = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    return str(text)


def render(source: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(source, TOKENS).render(messages)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("content", [TEXT, TWO_PARTS], ids=["text", "parts"])
def test_templates_of_parts_get_parts(name: str, content: Any):
    messages = conversation(content)
    text = render(PARTS[name], messages)
    assert text == by_transformers(PARTS[name], as_parts(messages))
    assert ("Be kind." if name == "first" else TEXT if content is TEXT else "one") in text


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize("content", [TEXT, TWO_PARTS], ids=["text", "parts"])
def test_templates_of_strings_get_strings(name: str, content: Any):
    """Several parts are joined by line breaks."""
    plain = "one\ntwo" if content is TWO_PARTS else TEXT
    assert render(STRINGS[name], conversation(content)) == by_transformers(STRINGS[name], conversation(plain))


@pytest.mark.parametrize("content", [TEXT, TWO_PARTS], ids=["text", "parts"])
def test_templates_of_both_get_what_was_sent(content: Any):
    text = render(QWEN_2_VL, conversation(content))
    assert text == by_transformers(QWEN_2_VL, conversation(content))
    assert ("onetwo" if content is TWO_PARTS else TEXT) in text


def test_parts_are_given_without_other_fields():
    source = "{% for m in messages %}{% for p in m.content %}{{ p | tojson }}{% endfor %}{% endfor %}"
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    assert render(source, [{"role": "user", "content": [part]}]) == '{"type": "text", "text": "x"}'


def test_no_content_is_null_where_the_template_asks_for_it():
    asks = "{% for m in messages %}{{ 'NONE' if m.content is none else m.content }}{% endfor %}"
    empty = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    of_parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}.{% endfor %}"
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert [render(source, [message]) for source in (asks, empty, of_parts)] == ["NONE", "[]", "."]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_has_both_names(name: str):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", name: "hm"}]
    reference = [messages[0], {"role": "assistant", "content": "y", "reasoning_content": "hm"}]
    assert render(QWEN_3, messages) == by_transformers(QWEN_3, reference)
    assert "hm" in render(QWEN_3, messages)
    source = "{% for m in messages %}{{ m.reasoning }},{{ m.reasoning_content }};{% endfor %}"
    assert render(source, messages) == ",;hm,hm;"
    both = {"role": "assistant", "reasoning": "a", "reasoning_content": "b"}
    assert render(source, [both]) == "a,b;"


def test_every_field_reaches_the_template():
    source = "{% for m in messages %}{{ m | dictsort | tojson }}{% endfor %}"
    given = {"thinking": "t", "refusal": "r", "name": "n", "tool_call_id": "c", "anything": [1, {"a": None}]}
    message = {"role": "tool", "content": "x", **given, "audio": None}
    assert dict(json.loads(render(source, [message]))) == {"role": "tool", "content": "x", **given}


ARGUMENTS = [
    ('{"city": "Bern", "n": 2}', {"city": "Bern", "n": 2}),
    ({"city": "Bern"}, {"city": "Bern"}),
    ("", {}),
    (None, {}),
    ("{broken", "{broken"),
    ("[1]", "[1]"),
    ("[" * 100_000, "[" * 100_000),
]


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS, ids=lambda value: str(value)[:12])
def test_history_of_tools_reaches_the_template(arguments: Any, expected: Any):
    def history(given: Any) -> list[dict[str, Any]]:
        call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": given}}
        return [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ]

    sent = history(arguments)
    sent[1]["content"] = None
    text = render(QWEN_2_5, sent)
    assert text == by_transformers(QWEN_2_5, history(expected))
    assert "sunny" in text
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == arguments  # the client's own stays as it is


@pytest.mark.parametrize("calls", [None, []])
def test_no_tool_calls_are_no_field(calls: Any):
    """Clients send back what they have got, nulls too, and templates ask whether the field is there."""
    source = "{% for m in messages %}{{ 'tool_calls' in m }}{{ m.function_call is defined }}{% endfor %}"
    message = {"role": "assistant", "content": "y", "tool_calls": calls, "function_call": None}
    assert render(source, [message]) == "FalseFalse"


def test_developer_is_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "x"}]
    as_system = [{"role": "system", "content": "Be kind."}, messages[1]]
    for source in (CHATML, QWEN_2_5, SMOL_VLM):
        assert render(source, messages) == render(source, as_system)
        assert "Be kind." in render(source, messages)
    knows = "{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{{ m.role }};{% endfor %}"
    assert render(knows, messages) == "Ddeveloper;user;"


def test_too_deep_for_a_template_is_the_clients_error():
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ deep | tojson }}", {}).render([{"role": "user"}], variables={"deep": deep})


async def test_over_http_as_well(served: ServedModel, backend: FakeBackend):
    """What the OpenAI client sends back of an answer, whole."""
    transport = httpx.ASGITransport(create_app(served))
    empty = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    messages = [
        {"role": "developer", "content": TWO_PARTS},
        {"role": "assistant", "content": "y", **empty},
        {"role": "function", "name": "f", "content": "z"},
    ]
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        for n, stream in ((1, False), (2, True)):
            body = {"messages": messages, "max_tokens": 1, "n": n, "stream": stream}
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            prompt = served.tokenizer.decode(backend.requests[-1].token_ids, skip_special_tokens=False)
            assert prompt.startswith("<|im_start|>system\none\ntwo<|im_end|>\n<|im_start|>assistant\ny")
            assert "<|im_start|>function\nz" in prompt
