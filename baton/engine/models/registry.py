"""The family of a `config.json` (baton/architectures.py) -> how to read that family's files."""

from collections.abc import Callable, Mapping
from typing import Any

from baton.architectures import family_of
from baton.engine.models import families
from baton.engine.models.decoder import DecoderConfig

READERS: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "llama": families.llama,
    "mistral": families.mistral,
    "qwen2": families.qwen2,
    "qwen3": families.qwen3,
}


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` describes. Raises StartupError for an architecture Baton can't run."""
    return READERS[family_of(config)](config)
