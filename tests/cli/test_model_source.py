"""What is fetched from the hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

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


@pytest.mark.parametrize("with_weights", [True, False])
def test_weights_are_fetched_once_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_weights: bool
) -> None:
    """Repositories hold them a second time, in other formats: that would double gigabytes."""

    def snapshot_download(model: str, **patterns: Any) -> str:
        for name in filter_repo_objects(sorted(NEEDED + OTHERS), **patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = find_model("mistralai/Mistral-7B-Instruct-v0.3", with_weights=with_weights)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        name for name in NEEDED if with_weights or not name.endswith(".safetensors")
    ]
    assert (source.directory, source.name) == (tmp_path, "mistralai/Mistral-7B-Instruct-v0.3")
