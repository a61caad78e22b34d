"""Scales that a checkpoint brings for its 8-bit weights and for an 8-bit KV cache."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from baton.core.errors import StartupError
from baton.engine.tensor_files import opened
from baton.model_files import safetensors_files

# What writes FP8 checkpoints agrees on the end of the name, not on where it hangs.
_KV_SCALE = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:[kv]_proj\.|attn\.)?([kv])_scale")
_WEIGHT, _WEIGHT_SCALE = ".weight", ".weight_scale"
_FLOAT8_IN_HEADERS = "F8_E4M3"  # what safetensors calls torch.float8_e4m3fn


def require_readable_weights(config: Mapping[str, Any]) -> None:
    """Raise StartupError where `config.json` describes quantized weights that Baton can't read.

    It reads float8 weights with one scale for each tensor or each output: compressed-tensors'
    "float-quantized" and the older "fp8".
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return
    obstacle = _obstacle(quantization)
    if obstacle is not None:
        raise StartupError(
            f"The checkpoint is quantized in a way that Baton does not read ({obstacle}); use its bfloat16 "
            "checkpoint, or one in FP8 with a scale for each tensor or channel."
        )


def _obstacle(quantization: Any) -> str | None:
    if not isinstance(quantization, dict):
        return f"quantization_config is {quantization!r}"
    method = quantization.get("quant_method")
    if method == "fp8":
        blocks = quantization.get("weight_block_size")
        return f"FP8 in blocks of {blocks}" if blocks else None
    if method != "compressed-tensors":
        return f"quant_method '{method}'"
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        kind = weights.get("type"), weights.get("num_bits")
        if kind != ("float", 8):
            return f"weights of type {kind[0]} in {kind[1]} bits"
        if weights.get("strategy") not in ("tensor", "channel"):
            return f"scales by {weights.get('strategy')}"
    return None


def weight_scales(files: tuple[Path, ...]) -> dict[str, Tensor]:
    """float32 scales of 8-bit weights, by the weight's name."""
    return {
        name.removesuffix("_scale"): tensor.float()
        for name, tensor in _tensors_like(files, lambda name: name.endswith(_WEIGHT_SCALE))
    }


def float8_matrices(files: tuple[Path, ...]) -> frozenset[str]:
    """Names, without `.weight`, of the matrices that are stored in float8; only headers are read."""
    found = set()
    for file in files:
        with opened(file) as checkpoint:
            names = [name for name in checkpoint.names if name.endswith(_WEIGHT)]
            found |= {name for name in names if checkpoint.dtype(name) == _FLOAT8_IN_HEADERS}
    return frozenset(name.removesuffix(_WEIGHT) for name in found)


def scales_of_outputs(name: str, weight: Tensor, scale: Tensor | None) -> Tensor:
    """float32 `[O]` for a float8 weight `[O, I]` with a scale of one element, `[O]` or `[O, 1]`.

    Raises StartupError for another one, or none.
    """
    if scale is None:
        raise StartupError(
            f"The checkpoint's float8 tensor '{name}' has no '{name}_scale'; check that the download is "
            "complete."
        )
    if scale.numel() != 1 and scale.shape not in ((weight.shape[0],), (weight.shape[0], 1)):
        raise StartupError(
            f"'{name}_scale' has shape {list(scale.shape)}; Baton reads one scale for each tensor or for "
            f"each of its {weight.shape[0]} outputs. Use a checkpoint that is quantized like that, or in "
            "bfloat16."
        )
    return scale.reshape(-1).expand(weight.shape[0])


def dequantized(name: str, weight: Tensor, scale: Tensor | None) -> Tensor:
    """float32 `[O, I]` of a float8 weight and its scale, which is as for `scales_of_outputs`."""
    return weight.float() * scales_of_outputs(name, weight, scale)[:, None]


def kv_cache_scales(model_dir: Path, num_layers: int) -> tuple[float, ...]:
    """K's and V's scale of each layer in turn, as `KVLayout.scales` has them; 1 where there is none."""
    scales = [1.0] * (2 * num_layers)
    for name, tensor in _tensors_like(safetensors_files(model_dir), _KV_SCALE.fullmatch):
        match = _KV_SCALE.fullmatch(name)
        assert match is not None
        layer, part = int(match[1]), "kv".index(match[2])
        if layer >= num_layers or tensor.numel() != 1 or not 0.0 < float(tensor) < float("inf"):
            raise StartupError(
                f"The checkpoint's '{name}' (shape {list(tensor.shape)}) is no scale of a layer's KV cache; "
                "leave --kv-cache-dtype fp8 out, or check the checkpoint."
            )
        scales[2 * layer + part] = float(tensor.float())
    return tuple(scales)


def _tensors_like(files: tuple[Path, ...], is_wanted: Callable[[str], object]) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for file in files:
        with opened(file) as checkpoint:
            found += [(name, checkpoint.tensor(name)) for name in checkpoint.names if is_wanted(name)]
    return found
