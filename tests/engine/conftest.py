"""Tiny checkpoints of every family, written once per test session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.config import EngineConfig
from baton.engine.factory import Engine, load_engine
from tests.checkpoints import reference_model, write_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "llama-tied-bias": {
        "architecture": "LlamaForCausalLM",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 1,
        "rope_parameters": LLAMA3_ROPE,
    },
    "llama-sharded-linear": {
        "architecture": "LlamaForCausalLM",
        "max_shard_size": "100KB",
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    },
    "llama-dynamic": {
        "architecture": "LlamaForCausalLM",
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0},
    },
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": None, "head_dim": 24},
    "mistral-window": {"architecture": "MistralForCausalLM", "sliding_window": 19},
    "mistral-window-of-some-layers": {
        "architecture": "MistralForCausalLM",
        "sliding_window": 19,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen2-window-yarn": {
        "architecture": "Qwen2ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 21,
        "max_window_layers": 1,
        "rope_parameters": YARN_ROPE,
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 32, "attention_bias": True},
    "qwen3-window": {
        "architecture": "Qwen3ForCausalLM",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}

Loader = Callable[[str], Any]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one of MODELS, written when first asked for."""
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = write_checkpoint(tmp_path_factory.mktemp(name), **MODELS[name])
        return written[name]

    return write


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Loader:
    """One of MODELS in transformers."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = reference_model(checkpoint(name))
        return loaded[name]

    return load


@pytest.fixture
def engine(checkpoint: Callable[[str], Path]) -> Callable[..., Engine]:
    """Loads one of MODELS with a fresh pool; keywords go to EngineConfig."""

    def load(name: str, **options: Any) -> Engine:
        return load_engine(checkpoint(name), EngineConfig(**({"kv_cache_bytes": 4 * 2**20} | options)))

    return load
