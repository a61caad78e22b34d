"""Writes tiny random checkpoints as transformers stores them, and asks transformers about them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

CONFIGS = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}


def write_checkpoint(
    directory: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a random model, the same for the same arguments; `overrides` are config fields over SMALL's.

    The weights are large enough that the likeliest token leads by far more than rounding.
    """
    config = CONFIGS[architecture](**(SMALL | overrides))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def write_float8(
    directory: Path, scale_shape: str, kv_scales: Mapping[str, float] | None = None, **overrides: Any
) -> Path:
    """As `write_checkpoint`, with layers' matrices in float8, a scale for each "tensor" or "channel".

    `kv_scales`: of layer 1, by name.
    """
    write_checkpoint(directory, dtype=torch.bfloat16, **overrides)
    file = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        dim = 1 if scale_shape == "channel" else (0, 1)
        scale = tensor.float().abs().amax(dim=dim, keepdim=True) / 448
        tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale if scale_shape == "channel" else scale.reshape(1)
        tensors[f"{name.removesuffix('weight')}input_scale"] = torch.ones(1)
    for name, number in (kv_scales or {}).items():
        tensors[f"model.layers.1.self_attn.{name}"] = torch.tensor(number)
    save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": scale_shape}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def reference_model(directory: Path) -> Any:
    """The checkpoint in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates after the prompt, end tokens ignored."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def reference_logprobs(model: Any, token_ids: list[int]) -> Tensor:
    """Log probabilities float32 `[len(token_ids), vocab]` of the token after each."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
