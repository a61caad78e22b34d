"""Which models Baton serves, by what their `config.json` says. Without torch, so that a model that is not
served is refused before anything of it is downloaded."""

from collections.abc import Mapping
from typing import Any

from baton.core.errors import StartupError

# The class that `config.json` names, and its family, which is the file's `model_type` as well.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_GENERATING, _BASE = "ForCausalLM", "Model"


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a `config.json`: by `architectures`, or by `model_type` where it names none.

    A family's base class counts too (LlamaModel): with tied embeddings it lacks nothing to generate with.
    Raises StartupError for what Baton can't run.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list):
        named = [named]
    for architecture in map(str, named):
        base, is_base = architecture.removesuffix(_BASE), architecture.endswith(_BASE)
        name = f"{base}{_GENERATING}" if is_base else architecture
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    model_type = config.get("model_type")
    if not named and model_type in ARCHITECTURES.values():
        return str(model_type)
    described = ", ".join(map(str, named)) or f"(none named; model_type {model_type!r})"
    raise StartupError(
        f"Baton can't run the architecture {described} of config.json; it runs {', '.join(ARCHITECTURES)}."
    )
