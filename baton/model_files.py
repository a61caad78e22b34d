"""What can be read from a model directory without torch: configuration, end tokens, files of weights.

The router needs these as much as the workers do, so nothing here imports torch.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.core.errors import StartupError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20  # the safetensors format's own limit


def read_config(model_dir: Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises StartupError where the directory or the file is missing, or the file is not a JSON object.
    """
    if not model_dir.is_dir():
        raise StartupError(f"The model directory '{model_dir}' does not exist; check the path of the model.")
    if not (model_dir / "config.json").is_file():
        raise StartupError(
            f"'{model_dir}' has no config.json; give the directory of a Hugging Face checkpoint."
        )
    return _read_json_object(model_dir / "config.json")


def eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Token ids that end an answer; empty if the model names none.

    `generation_config.json` wins over `config.json`, because chat models list their end-of-turn token only
    there. Raises StartupError as `read_config` does.
    """
    config = read_config(model_dir)
    ids = (read_generation_config(model_dir) or {}).get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id")
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(token_id) is int for token_id in listed):
        raise StartupError(f"'{model_dir}' has no usable 'eos_token_id' (it has {ids!r}); check it.")
    return tuple(token_id for token_id in listed if token_id >= 0)  # -1 stands for none


def read_generation_config(model_dir: Path) -> dict[str, Any] | None:
    """The `generation_config.json` of a folder, None if it has none; StartupError if it is no JSON object."""
    file = model_dir / "generation_config.json"
    return _read_json_object(file) if file.is_file() else None


def max_position_embeddings(config: Mapping[str, Any]) -> int:
    """Longest sequence, in tokens, that the model was made for.

    YaRN checkpoints often give the length before scaling, so theirs is at least `factor` times the original
    length. Raises StartupError if `config` does not say.
    """
    longest = config.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        raise StartupError(
            "config.json has no usable 'max_position_embeddings'; add the model's longest length."
        )
    rope = rope_parameters(config)
    if rope.get("rope_type", rope.get("type")) != "yarn" or rope.get("factor") is None:
        return longest
    original = positive_number(rope, "original_max_position_embeddings", longest)
    return max(longest, int(original * positive_number(rope, "factor")))


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (older files). Raises StartupError."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise StartupError(f"config.json has no usable rope parameters ({parameters!r}); check it.")
    return parameters


def positive_number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of `config.json` above 0, `default` where the key is left out; StartupError for all else."""
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        way_out = "" if default is None else f", or leave it out for {default:g}"
        raise StartupError(
            f"config.json's '{key}' must be a number above 0, but is {value!r}; correct it{way_out}."
        )
    return float(value)


def vocab_size(config: Mapping[str, Any]) -> int:
    """How many token ids the model knows. Raises StartupError if `config` does not say."""
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise StartupError(f"config.json has no usable 'vocab_size' (it has {size!r}); check the checkpoint.")
    return size


def safetensors_files(model_dir: Path) -> tuple[Path, ...]:
    """The files that hold the model's weights, in name order.

    `model.safetensors` alone, else the shards that `model.safetensors.index.json` lists, else every
    `*.safetensors` file. Raises StartupError where there are none or a shard is missing.
    """
    if (model_dir / _SINGLE_FILE).is_file():
        return (model_dir / _SINGLE_FILE,)
    if (model_dir / _INDEX_FILE).is_file():
        return _indexed_files(model_dir)
    files = tuple(sorted(model_dir.glob("*.safetensors")))
    if not files:
        raise StartupError(
            f"'{model_dir}' has no *.safetensors files; download the weights, or convert them to safetensors."
        )
    return files


def require_complete(file: Path) -> None:
    """Raise StartupError where a safetensors file can't be read, or ends within its header.

    The file starts with its JSON header's length, unsigned 64 bits little endian.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise StartupError(f"'{file}' can't be read: {error.strerror}") from error
    if not header or len(header) != length:
        raise StartupError(f"'{file}' is not a complete safetensors file; download it again.")


def _indexed_files(model_dir: Path) -> tuple[Path, ...]:
    weight_map = _read_json_object(model_dir / _INDEX_FILE).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not is_map or not weight_map:
        raise StartupError(f"'{model_dir / _INDEX_FILE}' has no weight_map; download the checkpoint again.")
    files = tuple(model_dir / name for name in sorted(set(weight_map.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise StartupError(
            f"'{model_dir}' lacks {len(missing)} of {len(files)} weight files ({', '.join(missing[:3])}); "
            "download the checkpoint again."
        )
    return files


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise StartupError(f"'{file}' can't be read as JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise StartupError(f"'{file}' must hold a JSON object; download it again.")
    return content
