"""docs/how-to/add-a-model.md: a family is a reader and a name, and nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from baton import architectures
from baton.config import EngineConfig
from baton.core.sampling import SamplingParams
from baton.engine.models import families, registry
from baton.engine.models.decoder import DecoderConfig
from tests.checkpoints import reference_greedy, reference_model, write_checkpoint
from tests.colocated import ColocatedEngine

PROMPT = [5, 9, 2, 77, 31, 8, 120, 44, 3]


def new_family(config: Mapping[str, Any]) -> DecoderConfig:
    """One that normalises queries and keys, and calls its number of layers something else."""
    return families.qwen3({**config, "num_hidden_layers": config["n_layer"]})


def test_a_reader_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "model", "Qwen3ForCausalLM", head_dim=32)
    expected = reference_greedy(reference_model(directory), PROMPT, 12)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"], config["n_layer"] = ["NewForCausalLM"], config.pop("num_hidden_layers")
    (directory / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(architectures.ARCHITECTURES, "NewForCausalLM", "new")
    monkeypatch.setitem(registry.READERS, "new", new_family)
    engine = ColocatedEngine(directory, EngineConfig(dtype="float32", kv_cache_bytes=4 << 20))
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    assert engine.token_ids([PROMPT], greedy) == [expected]
