"""Tokens, texts and templates' variables equal those of transformers on the same directory.

Where transformers does what a server should not, a test says so with the reason.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import StartupError
from baton_router.text.tokenizer import Tokenizer
from tests.router_front.tokenizer_directories import NAMED, TOKEN, Directory, directories, token

DIRECTORIES = dict(directories())
TEXTS = [
    f"a{TOKEN}b",
    f"Hello  {TOKEN} <tool> world <|im_end|>. <s>x</s>",
    "a B b aBa Hello, wörld! 日本 🎉",
    " <a><b> leading",
]
TEMPLATE = (
    "{{ bos_token }}{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}"
    "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
)


@functools.cache
def reference(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_equals_transformers(name: str, tmp_path: Path):
    path = DIRECTORIES[name].write(tmp_path)
    tokenizer, expected = Tokenizer.load(path), reference(path)
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = expected.encode(text, add_special_tokens=add_special_tokens)
            assert tokenizer.encode_now(text, add_special_tokens=add_special_tokens) == ids
        for skip in (True, False):
            decoded = expected.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == decoded
            detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
            assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == decoded


@pytest.mark.parametrize("name", DIRECTORIES)
def test_templates_get_the_same_variables(name: str, tmp_path: Path):
    path = DIRECTORIES[name].write(tmp_path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    expected = reference(path).apply_chat_template(messages, tokenize=False)
    assert Tokenizer.load(path).render_chat(messages, add_generation_prompt=False) == expected


def test_the_file_counts_and_not_the_class(tmp_path: Path):
    """Transformers 5 builds the pipeline of a Llama tokenizer anew, by today's defaults for the class. Models
    were trained with what tokenizer.json says."""
    path = Directory("llama", {**NAMED, "tokenizer_class": "LlamaTokenizerFast"}).write(tmp_path)
    assert Tokenizer.load(path).encode_now(" lead") != reference(path).encode(" lead")
    plain = Directory("llama", NAMED).write(tmp_path)
    assert Tokenizer.load(path).encode_now(" lead") == Tokenizer.load(plain).encode_now(" lead")


def test_spaces_of_an_answer_are_not_cleaned_up(tmp_path: Path):
    """It takes away what the model wrote, as transformers says where it ignores the setting for BPE; and in a
    stream the space is sent before the character that would have removed it comes."""
    path = Directory("unigram", {**NAMED, "clean_up_tokenization_spaces": True}).write(tmp_path)
    tokenizer, expected = Tokenizer.load(path), reference(path)
    ids = tokenizer.encode_now("hello , world")
    assert tokenizer.decode(ids) == "hello , world"
    assert expected.decode(ids) == "hello, world"


def test_objects_without_a_type_are_tokens(tmp_path: Path):
    """Files of other tools write them so. Transformers fails at them."""
    objects = {"eos_token": {"content": "</s>"}, "additional_special_tokens": [token()]}
    tokenizer = Tokenizer.load(Directory("byte level", objects).write(tmp_path))
    assert [tokenizer.token_name(token_id) for token_id in tokenizer.eos_token_ids] == ["</s>"]
    assert len(tokenizer.encode_now(f"a{TOKEN}b")) == 3


def test_a_token_of_another_id_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = Directory("byte level", {"added_tokens_decoder": [token("<a>"), token("<s>")]})
    Tokenizer.load(directory.write(tmp_path))
    assert "the files give '<s>' the id" in caplog.text
    assert "<a>" not in caplog.text


@pytest.mark.parametrize(
    "config",
    [{"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"1": {}}}, {"eos_token": {"lstrip": 1}}],
)
def test_what_no_token_can_be_stops_the_start(config: dict[str, Any], tmp_path: Path):
    path = Directory("byte level").write(tmp_path)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="special tokens"):
        Tokenizer.load(path)
