"""How answers are sampled where requests leave it out: what a checkpoint's generation_config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.core.errors import InvalidRequest, StartupError
from baton.core.sampling import SamplingParams
from baton.model_files import read_generation_config

NONE = ("baton", "vllm")
# As generation_config.json calls them, and as requests do; all else there is for transformers alone.
_FIELDS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`fields` by the names that requests have for them; `origin` says where they are from, for people."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def text(self) -> str:
        """One line for the log."""
        if not self.fields:
            return "no defaults of sampling but the API's own"
        values = ", ".join(f"{name} {value}" for name, value in self.fields.items())
        return f"sampling where requests leave it out: {values} ({self.origin})"


def generation_defaults(model_dir: Path, source: str, overrides: Mapping[str, Any]) -> GenerationDefaults:
    """`source`: auto, for the model's own, which need not be there; one of NONE; or a folder.

    A null among `overrides` takes a default away. Raises StartupError for a folder without a
    generation_config.json, unknown overrides, and values that requests could not have.
    """
    unknown = [name for name in overrides if name not in _FIELDS]
    if unknown:
        raise StartupError(
            f"override-generation-config has no '{unknown[0]}': there are {', '.join(_FIELDS)}"
        )
    folder = None if source in NONE else model_dir if source == "auto" else Path(source).expanduser()
    config = {} if folder is None else read_generation_config(folder)
    if config is None and source != "auto":
        raise StartupError(f"generation-config: there is no generation_config.json in '{folder}'")
    values = {**(config or {}), **overrides}
    fields = {_FIELDS[name]: value for name, value in values.items() if name in _FIELDS and value is not None}
    origins = [f"{folder}/generation_config.json"] if config else []
    origin = " and ".join([*origins, *(["--override-generation-config"] if overrides else [])])
    _check(fields, origin)
    return GenerationDefaults(fields, origin)


def _check(fields: Mapping[str, Any], origin: str) -> None:
    for name, value in fields.items():
        whole = name in ("top_k", "max_tokens")
        if type(value) is not int and (whole or type(value) is not float):
            raise StartupError(f"{name} of {origin} must be a number, but is {value!r}")
    try:
        SamplingParams(**{name: value for name, value in fields.items() if (name, value) != ("top_k", -1)})
    except InvalidRequest as error:
        raise StartupError(f"{origin}: {error}") from None
