"""Which models are found, what is fetched of them from the hub, and what is said of those that are none."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from baton.architectures import ARCHITECTURES
from baton.core.errors import StartupError
from baton_launch.model_source import find_model

NEEDED = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]
OTHERS = [
    "README.md",
    "consolidated.safetensors",
    "onnx/config.json",
    "original/model.safetensors",
    "pytorch_model.bin",
]
SERVED = {"architectures": ["MistralForCausalLM"]}


class Hub:
    """One repository, of whose files `downloaded` are here."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.names = NEEDED + OTHERS
        self.config: Mapping[str, Any] = SERVED

    def snapshot_download(self, model: str, **patterns: Any) -> str:
        for name in filter_repo_objects(sorted(self.names), **patterns):
            (self.cache / name).parent.mkdir(exist_ok=True)
            (self.cache / name).write_text(json.dumps(self.config))
        return str(self.cache)

    @property
    def downloaded(self) -> list[str]:
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*.*"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def refusal(model: str) -> str:
    with pytest.raises(StartupError) as caught:
        find_model(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("with_weights", [True, False])
def test_weights_are_fetched_once_or_not_at_all(hub: Hub, with_weights: bool) -> None:
    """Repositories hold them a second time, in other formats: that would double gigabytes."""
    source = find_model("mistralai/Mistral-7B-Instruct-v0.3", with_weights=with_weights)
    assert hub.downloaded == [name for name in NEEDED if with_weights or not name.endswith(".safetensors")]
    assert (source.directory, source.name) == (hub.cache, "mistralai/Mistral-7B-Instruct-v0.3")


@pytest.mark.parametrize(
    "config", [{"architectures": ["GPT2LMHeadModel"]}, {"model_type": "gpt2"}, {"architectures": []}]
)
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_model_that_is_not_served_is_refused_before_it_is_fetched(
    hub: Hub, config: Mapping[str, Any], with_weights: bool
) -> None:
    hub.config = config
    with pytest.raises(StartupError) as caught:
        find_model("openai-community/gpt2", with_weights=with_weights)
    assert hub.downloaded == ["config.json"]
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["LoRA", "merge"]),
        (["model-Q4_K_M.gguf"], ["config.json", "GGUF"]),
    ],
)
def test_what_is_no_model_on_the_hub(hub: Hub, names: list[str], words: list[str]) -> None:
    hub.names = names
    line = refusal("someone/something")
    assert all(word in line for word in ["'someone/something' on the Hugging Face hub", *words])
    assert not {"adapter_model.safetensors", "model-Q4_K_M.gguf"}.intersection(hub.downloaded)


def test_a_directory_of_a_model_that_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel" in refusal(str(tmp_path))


def test_a_directory_of_a_lora_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter, which Baton does not apply: merge it" in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["model.gguf", "Model.GGUF"])
def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whether or not it is there, and however it is written: it is no hub id."""
    monkeypatch.chdir(tmp_path)
    for spelling in (name, f"./{name}", f"some/{name}"):
        assert "is a GGUF file" in refusal(spelling)
    (tmp_path / name).touch()
    assert "with safetensors" in refusal(name)


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "give the directory that it lies in" in refusal(str(tmp_path / "model.safetensors"))
