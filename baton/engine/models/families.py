"""Model families as data: a Hugging Face `config.json` becomes a DecoderConfig.

Keys that a file leaves out get the family's defaults in Hugging Face transformers. Everything here raises
StartupError, with the key's name, where a file asks for what Baton does not do.
"""

from collections.abc import Mapping
from typing import Any

from baton.core.errors import StartupError
from baton.engine.layers.gate import ACTIVATIONS
from baton.engine.layers.rope import ROPE_TYPES, RopeConfig, yarn_attention_factor
from baton.engine.models.decoder import DecoderConfig
from baton.engine.quantization.checkpoint_scales import require_readable_weights
from baton.model_files import max_position_embeddings, positive_number, rope_parameters

HFConfig = Mapping[str, Any]

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def llama(config: HFConfig) -> DecoderConfig:
    """Llama 1 to 3, and the many models that use its architecture."""
    attention_bias = bool(config.get("attention_bias", False))
    return _decoder_config(
        config,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def mistral(config: HFConfig) -> DecoderConfig:
    """Mistral: the sliding window, if there is one, holds in every layer unless `layer_types` names some.

    A file without `sliding_window` means 4,096.
    """
    window = _optional(config, "sliding_window", 4096)
    windows = _windows_by_type(config, window) or (window,) * _required(config, "num_hidden_layers")
    return _decoder_config(config, windows=windows, kv_heads=8)


def qwen2(config: HFConfig) -> DecoderConfig:
    """Qwen 2 and 2.5: biases on queries, keys and values only."""
    return _decoder_config(config, qkv_bias=True, windows=_qwen_windows(config), kv_heads=32)


def qwen3(config: HFConfig) -> DecoderConfig:
    """Qwen 3, dense: normalised queries and keys, a head_dim of its own."""
    attention_bias = bool(config.get("attention_bias", False))
    return _decoder_config(
        config,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        windows=_qwen_windows(config),
        kv_heads=32,
        head_dim=128,
    )


def _decoder_config(
    config: HFConfig,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> DecoderConfig:
    """`kv_heads` and `head_dim` are defaults; None: as many as heads, and hidden_size / heads."""
    require_readable_weights(config)
    hidden_size, num_heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    num_layers = _required(config, "num_hidden_layers")
    num_kv_heads = _optional(config, "num_key_value_heads", kv_heads) or num_heads
    if num_heads % num_kv_heads:
        raise StartupError(
            f"config.json has {num_heads} attention heads, not a multiple of its "
            f"{num_kv_heads} key-value heads."
        )
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise StartupError(f"config.json's hidden_act '{activation}' is none of {', '.join(ACTIVATIONS)}.")
    head_dim = _optional(config, "head_dim", head_dim) or hidden_size // num_heads
    if head_dim % 2:
        raise StartupError(
            f"config.json's heads have {head_dim} numbers, which rotary positions can't pair; "
            "check 'head_dim', or 'hidden_size' and 'num_attention_heads'."
        )
    return DecoderConfig(
        vocab_size=_required(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_required(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive_number(config, "rms_norm_eps", 1e-6),
        activation=activation,
        rope=rope_config(config),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        windows=windows or (None,) * num_layers,
        max_position_embeddings=max_position_embeddings(config),
    )


def rope_config(config: HFConfig) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older files)."""
    parameters = rope_parameters(config)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise StartupError(
            f"config.json has rope parameters for each kind of layer ({', '.join(parameters)}), which Baton "
            "does not support."
        )
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise StartupError(f"config.json's rope type '{rope_type}' is none of {', '.join(ROPE_TYPES)}.")
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise StartupError("config.json's partial_rotary_factor is not 1, which Baton does not support.")
    theta = positive_number({**config, **parameters}, "rope_theta", 10_000.0)
    if rope_type == "default":
        return RopeConfig(
            "default", theta, factor=1.0, original_length=_required(config, "max_position_embeddings")
        )
    return _scaled_rope(config, parameters, rope_type, theta)


def _scaled_rope(config: HFConfig, parameters: HFConfig, rope_type: str, theta: float) -> RopeConfig:
    longest = _required(config, "max_position_embeddings")
    # Here alone the file's top level goes first, as in transformers.
    original = positive_number({**parameters, **config}, "original_max_position_embeddings", longest)
    values = {key: value for key, value in parameters.items() if value is not None}
    if "factor" not in values and rope_type != "yarn":
        raise StartupError(f"config.json's rope type '{rope_type}' needs a 'factor'.")
    factor = positive_number(values, "factor", longest / original if rope_type == "yarn" else None)
    attention_factor = 1.0
    if rope_type == "yarn":
        attention_factor = _attention_factor(values, factor)
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=factor,
        original_length=original,
        low_freq_factor=positive_number(parameters, "low_freq_factor", 1.0),
        high_freq_factor=positive_number(parameters, "high_freq_factor", 4.0),
        beta_fast=positive_number(values, "beta_fast", 32.0),
        beta_slow=positive_number(values, "beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=attention_factor,
    )


def _attention_factor(values: HFConfig, factor: float) -> float:
    if "attention_factor" in values:
        return positive_number(values, "attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        scales = positive_number(values, "mscale"), positive_number(values, "mscale_all_dim")
        return yarn_attention_factor(factor, *scales)
    return yarn_attention_factor(factor, None, None)


def _qwen_windows(config: HFConfig) -> tuple[int | None, ...]:
    """The window holds in the layers that `layer_types` names, else from layer `max_window_layers` on."""
    window = _optional(config, "sliding_window", 4096) if config.get("use_sliding_window", False) else None
    named = _windows_by_type(config, window)
    if named is not None:
        return named
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise StartupError(f"config.json's 'max_window_layers' must be a whole number, but is {first!r}.")
    num_layers = _required(config, "num_hidden_layers")
    return tuple(window if index >= first else None for index in range(num_layers))


def _windows_by_type(config: HFConfig, window: int | None) -> tuple[int | None, ...] | None:
    """The window in the layers that `layer_types` calls sliding; None if the file has no such list."""
    layer_types, num_layers = config.get("layer_types"), _required(config, "num_hidden_layers")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise StartupError(f"config.json's layer_types must name all {num_layers} layers.")
    if unknown := sorted({str(kind) for kind in layer_types} - _LAYER_TYPES):
        raise StartupError(
            f"config.json's layer_types has {', '.join(unknown)}, but Baton knows only "
            f"{' and '.join(sorted(_LAYER_TYPES))}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _optional(config: HFConfig, key: str, default: int | None) -> int | None:
    """`default` where the key is left out; null is None."""
    if config.get(key, default) is None:
        return None
    return _required({key: default, **config}, key)


def _required(config: HFConfig, key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise StartupError(f"config.json has no usable '{key}' (it has {value!r}); check the checkpoint.")
    return value
