"""Every RoPE variant has transformers' numbers, from new and old config files."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from baton.core.errors import StartupError
from baton.engine.layers.rope import RotaryEmbedding, rotary_frequencies, rotate
from baton.engine.models.families import rope_config

HEAD_DIM = 64
VARIANTS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
@pytest.mark.parametrize("style", ["new", "old", "older"])
def test_equals_transformers(variant, theta, style):
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters=variant | {"rope_theta": theta},
    )
    file = {"max_position_embeddings": 2048} | _written(variant, theta, style)
    rope = rope_config(file)
    theirs = LlamaRotaryEmbedding(config)
    assert torch.allclose(rotary_frequencies(rope, HEAD_DIM), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 7, 511, 2047])
    ours = RotaryEmbedding(rope, HEAD_DIM, torch.float32, torch.device("cpu")).angles(positions)
    states = torch.randn(5, 3, HEAD_DIM)
    expected, _ = apply_rotary_pos_emb(states, states, *(a[0] for a in theirs(states, positions[None])))
    assert torch.allclose(rotate(states, *ours), expected, atol=2e-3)


def _written(variant, theta, style):
    if style == "new":
        return {"rope_parameters": variant | {"rope_theta": theta}}
    scaling = dict(variant)
    if style == "older":
        scaling["type"] = scaling.pop("rope_type")
    return {"rope_theta": theta, "rope_scaling": None if scaling.get("rope_type") == "default" else scaling}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rope_scaling": {"type": "mrope"}}, "'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "needs a 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "kind of layer"),
    ],
)
def test_refuses_what_it_does_not_know(config, reason):
    with pytest.raises(StartupError, match=reason):
        rope_config({"max_position_embeddings": 2048} | config)
