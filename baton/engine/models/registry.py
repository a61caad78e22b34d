"""Architecture name in `config.json` -> how to read that family."""

from collections.abc import Callable, Mapping
from typing import Any

from baton.core.errors import StartupError
from baton.engine.models import families
from baton.engine.models.decoder import DecoderConfig

ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "LlamaForCausalLM": families.llama,
    "MistralForCausalLM": families.mistral,
    "Qwen2ForCausalLM": families.qwen2,
    "Qwen3ForCausalLM": families.qwen3,
}


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` describes. Raises StartupError for an architecture Baton can't run."""
    named = config.get("architectures") or []
    if not isinstance(named, list):
        named = [named]
    for architecture in named:
        if isinstance(architecture, str) and architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture](config)
    raise StartupError(
        f"Baton can't run the architecture {', '.join(map(str, named)) or '(none named)'} of config.json; "
        f"it runs {', '.join(ARCHITECTURES)}."
    )
