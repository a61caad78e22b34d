"""Finds the model that MODEL on the command line means."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from baton.architectures import family_of
from baton.core.errors import StartupError
from baton.model_files import read_config

SHIPPED_MODEL = Path(str(files("baton"))) / "demo_model"
SHIPPED_MODEL_NAME = "baton-demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_GGUF, _ADAPTER = ".gguf", "adapter_config.json"
# These say whether it is served; nothing else is downloaded before.
_DECIDING = ["config.json", _ADAPTER]
_WEIGHTS = "*.safetensors"
_HUB_FILES = [_WEIGHTS, "*.json", "tokenizer*", "*.jinja"]
# Other formats lie in folders; Mistral's stores all weights a second time beside the shards.
_OTHER_HUB_FILES = ["*/*", "consolidated*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine's disk, and what it is called if the user says nothing else."""

    directory: Path
    name: str


def find_model(model: str | None, *, with_weights: bool = True) -> ModelSource:
    """A local directory in Hugging Face format, a hub id (fetched if need be), or the shipped model for None
    or its name.

    What looks like a path is never looked up on the hub. Raises StartupError where there is no such model, or
    Baton can't run it; of one on the hub nothing but its configuration is downloaded for that.
    """
    if model is None or (model == SHIPPED_MODEL_NAME and not Path(model).exists()):
        if not SHIPPED_MODEL.is_dir():
            raise StartupError("this installation of Baton holds no model: name one with `baton serve MODEL`")
        return ModelSource(_require_model(SHIPPED_MODEL), SHIPPED_MODEL_NAME)
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) or path.exists():
        directory = _require_model(path.resolve())
        is_shipped = directory == SHIPPED_MODEL.resolve()
        return ModelSource(directory, SHIPPED_MODEL_NAME if is_shipped else directory.name)
    if path.suffix.lower() == _GGUF or not _HUB_ID.fullmatch(model):
        raise StartupError(_not_a_model(model, path))
    _require_model(_fetch(model, _DECIDING), f"'{model}' on the Hugging Face hub")
    left_out = _OTHER_HUB_FILES if with_weights else [*_OTHER_HUB_FILES, _WEIGHTS]
    return ModelSource(_fetch(model, _HUB_FILES, left_out), model)


def _require_model(directory: Path, called: str | None = None) -> Path:
    """The directory; StartupError, with what the person calls it, where it holds no model that is served."""
    called = called or str(directory)
    if not directory.is_dir():
        raise StartupError(_not_a_model(called, directory))
    if (directory / "config.json").is_file():
        family_of(read_config(directory))
        return directory
    if (directory / _ADAPTER).is_file():
        raise StartupError(
            f"{called} is a LoRA adapter, which Baton does not apply: merge it into its base model "
            "(merge_and_unload of the package peft), save that, and serve it"
        )
    raise StartupError(
        f"{called} holds no config.json: a model directory in Hugging Face format has one, and GGUF files "
        "are not read"
    )


def _not_a_model(called: str, path: Path) -> str:
    """What to do where no directory is."""
    if path.suffix.lower() == _GGUF:
        return (
            f"{called} is a GGUF file, which Baton does not read: give the same model's directory or hub id "
            "with safetensors"
        )
    if path.is_file():
        return f"{called} is a file: give the directory that it lies in, with its config.json and tokenizer"
    if path.is_absolute():
        return f"there is no model directory {called}"
    return f"'{called}' is neither a directory nor a Hugging Face model id"


def _fetch(model: str, files: Sequence[str], left_out: Sequence[str] = ()) -> Path:
    """Download files of a model, or find them in the hub's cache. Its progress bars go to standard error."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(files), ignore_patterns=list(left_out)))
    except GatedRepoError:
        raise StartupError(
            f"'{model}' is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise StartupError(
            f"there is neither a directory '{model}' nor a model of that name on the Hugging Face hub"
        ) from None
    except Exception as error:  # whatever its HTTP library raises, which differs between versions
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StartupError(f"could not reach the Hugging Face hub to fetch '{model}': {reason}") from error
