"""Loading tokenizer files, and chat templates against transformers."""

import asyncio
import json
from pathlib import Path

import pytest

from baton.core.errors import InvalidRequest, StartupError
from baton_router.text.chat_template import ChatTemplate
from baton_router.text.tokenizer import Tokenizer
from tests.router_front.conftest import train_tokenizer, write_model

MESSAGES = [
    {"role": "system", "content": ' Be <brief> & "kind". '},
    {"role": "user", "content": "Grüße 🎉\nzwei"},
    {"role": "assistant", "content": "Ja"},
    {"role": "user", "content": "x"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] | trim + '<|im_end|>' + '\\n' }}\n{% endfor %}\n"
        "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    ),
    "json": "  {% for m in messages %}\n  {{ m | tojson }}|{{ m | tojson(indent=2) }}\n  {% endfor %}\n",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if loop.last %}{% break %}{% endif %}{{ ns.n }}{{ m['missing'] }}{% endfor %}{{ ns.n }}"
    ),
    "absent": "{% if tools is not none %}tools{% endif %}{{ documents is defined }}{{ other is defined }}",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(name: str, add_generation_prompt: bool):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    expected = reference.apply_chat_template(
        MESSAGES,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('No.') }}",
        "{{ missing.field }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.code == "chat_template_error"


def test_broken_template_stops_the_start():
    with pytest.raises(StartupError, match="line 2"):
        ChatTemplate("\n{% if %}", {})


def test_client_variables_do_not_replace_the_messages():
    template = ChatTemplate("{{ messages | length }}{{ deep }}", {})
    assert template.render(MESSAGES, variables={"messages": [], "deep": 1}) == "41"


def test_missing_tokenizer_stops_the_start(tmp_path: Path):
    with pytest.raises(StartupError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[")])
def test_unreadable_files_stop_the_start(tmp_path: Path, name: str, content: str):
    write_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(StartupError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
    ],
)
def test_an_unreadable_template_stops_the_start(tmp_path: Path, name: str, content: bytes):
    write_model(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match="chat template"):
        Tokenizer.load(tmp_path)


def test_model_without_template_says_so(tmp_path: Path):
    tokenizer = Tokenizer.load(write_model(tmp_path, template=None))
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat(MESSAGES)


def test_template_file_wins_and_named_templates_are_found(tmp_path: Path):
    write_model(tmp_path)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).render_chat(MESSAGES) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).render_chat(MESSAGES) == "file"


def test_reads_special_tokens(tokenizer: Tokenizer):
    assert [tokenizer.token_name(token_id) for token_id in tokenizer.eos_token_ids] == ["<|im_end|>"]


async def test_long_text_is_encoded_off_the_loop(tokenizer: Tokenizer):
    text = "hello wörld " * 20_000
    encoding = asyncio.create_task(tokenizer.encode(text, max_tokens=100_000))
    num_turns = 0
    while not encoding.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns > 2  # on the loop the encode would be over in the first
    assert await encoding == tokenizer.encode_now(text)


async def test_far_too_long_text_is_refused_before_all_of_it_is_encoded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    lengths = []
    encode_now = Tokenizer.encode_now

    def watched(self: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        return encode_now(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_now", watched)
    text = "hello wörld " * 200_000
    with pytest.raises(InvalidRequest, match="more than 20000 tokens, and at most 10000") as caught:
        await tokenizer.encode(text, max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    assert sum(lengths) < len(text) / 10


async def test_long_text_of_long_tokens_is_encoded_whole(tokenizer: Tokenizer):
    """Its characters alone say nothing, and what is cut in slices to count it stays whole."""
    text = "<|im_start|>" * 20_000
    assert await tokenizer.encode(text, max_tokens=15_000) == tokenizer.encode_now(text)


def test_truncation_of_the_file_is_switched_off(tmp_path: Path):
    backend = train_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode_now("x" * 100)) > 50
    assert len(tokenizer.encode_now("x")) == 1
