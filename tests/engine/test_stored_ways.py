"""Checkpoints that transformers loads whole, however they name their tensors and their class."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.architectures import ARCHITECTURES
from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.engine.factory import load_engine
from baton.engine.models.registry import READERS
from tests.checkpoints import CONFIGS, reference_greedy, reference_logprobs, reference_model, write_checkpoint
from tests.checkpoints import write_float8 as write_float8_checkpoint
from tests.engine.driver import GREEDY_LOGPROBS, Driver, Request, make_prompt

OPTIONS = EngineConfig(kv_cache_bytes=2**22)

Tensors = dict[str, Tensor]


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def projection_alone(tensors: Tensors) -> Tensors:
    return {
        "lm_head.weight" if name == "model.embed_tokens.weight" else name: tensor
        for name, tensor in tensors.items()
    }


def store(directory: Path, change: Callable[[Tensors], Tensors] | None = None, **fields: Any) -> None:
    """Write tensors and config.json anew; a field that is None is taken out."""
    if change is not None:
        file = directory / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    file = directory / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def require_same_as_transformers(directory: Path) -> None:
    model = reference_model(directory)
    request = Request(make_prompt(21), GREEDY_LOGPROBS)
    Driver(load_engine(directory, OPTIONS)).generate([request], 12)
    assert request.output == reference_greedy(model, request.prompt, 12)
    expected = reference_logprobs(model, request.token_ids)[len(request.prompt) - 1 : -1]
    ours = torch.tensor([token.logprob for token in request.sampled])
    assert ours == pytest.approx(expected.gather(1, torch.tensor(request.output)[:, None])[:, 0], abs=1e-3)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("change", [without_prefix, projection_alone])
def test_tied_embeddings(tmp_path: Path, architecture: str, change: Callable[[Tensors], Tensors]) -> None:
    write_checkpoint(tmp_path, architecture, tie_word_embeddings=True)
    store(tmp_path, change)
    require_same_as_transformers(tmp_path)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_base_models_class(tmp_path: Path, architecture: str) -> None:
    """As `save_pretrained` of the class itself stores it, but for the weights being those of a model that
    generates."""
    write_checkpoint(tmp_path, architecture, tie_word_embeddings=True)
    store(tmp_path, without_prefix, architectures=[architecture.replace("ForCausalLM", "Model")])
    require_same_as_transformers(tmp_path)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_no_class_at_all(tmp_path: Path, architecture: str) -> None:
    write_checkpoint(tmp_path, architecture)
    store(tmp_path, architectures=None)
    require_same_as_transformers(tmp_path)


def test_some_names_with_the_prefix_and_some_without(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    store(tmp_path, without_prefix, architectures=None)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    require_same_as_transformers(tmp_path)


def test_scales_without_the_prefix(tmp_path: Path) -> None:
    """They belong to the tensors' names, however these are stored."""
    plain = write_float8_checkpoint(tmp_path / "plain", "channel", {"k_scale": 0.5})
    renamed = write_float8_checkpoint(tmp_path / "renamed", "channel", {"k_scale": 0.5})
    store(renamed, without_prefix)
    outputs, scales = [], []
    for directory in (plain, renamed):
        engine = load_engine(directory, EngineConfig(kv_cache_bytes=2**22, kv_cache_dtype="float8_e4m3fn"))
        request = Request(make_prompt(20))
        Driver(engine).generate([request], 4)
        outputs.append(request.output)
        scales.append(engine.page_store.layout.scales)
    assert outputs[0] == outputs[1]
    assert scales[0] == scales[1] != (1.0,) * 6


@pytest.mark.parametrize("names_class", [True, False])
def test_a_base_model_that_can_not_generate_is_refused(tmp_path: Path, names_class: bool) -> None:
    write_checkpoint(tmp_path)

    def base_alone(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in without_prefix(tensors).items() if name != "lm_head.weight"}

    store(tmp_path, base_alone, architectures=["LlamaModel"] if names_class else None)
    with pytest.raises(StartupError) as caught:
        load_engine(tmp_path, OPTIONS)
    assert str(caught.value).count("\n") == 0
    assert "is a base model, which generates no text" in str(caught.value)
    assert "tie_word_embeddings" in str(caught.value)


def test_each_family_that_is_named_has_a_reader() -> None:
    assert set(ARCHITECTURES.values()) == set(READERS)
