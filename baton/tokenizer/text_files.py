"""The small files beside tokenizer.json: special tokens' names, added tokens and the chat template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.errors import StartupError


@dataclass(frozen=True, slots=True)
class ModelTextFiles:
    """What they hold, as written; a file that is not there is an empty object."""

    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[str, Any]
    chat_template: str | None


def read_model_text_files(model_dir: Path) -> ModelTextFiles:
    """Raises StartupError where a file can't be read."""
    config = _read_object(model_dir / "tokenizer_config.json")
    return ModelTextFiles(
        config,
        _read_object(model_dir / "special_tokens_map.json"),
        _read_object(model_dir / "added_tokens.json"),
        _read_template(model_dir, config),
    )


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise StartupError(f"{path} must hold a JSON object.")
    return content


def _read_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """The file of its own wins over the config, as in transformers; of named templates, `default`.

    Raises StartupError where there is one that can't be read.
    """
    path = model_dir / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            return named.get("default") or next(iter(named.values()), None)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StartupError(f"The chat template of '{model_dir}' can't be read: {error!r}") from error
    return template
