"""Finds the model that MODEL on the command line means."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from baton.core.errors import StartupError

SHIPPED_MODEL = Path(str(files("baton"))) / "demo_model"
SHIPPED_MODEL_NAME = "baton-demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
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
    """A local directory in Hugging Face format, a hub id (fetched if need be), or the shipped model for None.

    What looks like a path is never looked up on the hub. Raises StartupError where there is no such model.
    """
    if model is None:
        if not SHIPPED_MODEL.is_dir():
            raise StartupError("this installation of Baton holds no model: name one with `baton serve MODEL`")
        return ModelSource(_require_model(SHIPPED_MODEL), SHIPPED_MODEL_NAME)
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) or path.exists():
        directory = _require_model(path.resolve())
        is_shipped = directory == SHIPPED_MODEL.resolve()
        return ModelSource(directory, SHIPPED_MODEL_NAME if is_shipped else directory.name)
    if not _HUB_ID.fullmatch(model):
        raise StartupError(f"'{model}' is neither a directory nor a Hugging Face model id")
    return ModelSource(_require_model(_fetch(model, with_weights)), model)


def _require_model(directory: Path) -> Path:
    if not directory.is_dir():
        raise StartupError(f"there is no model directory {directory}")
    if not (directory / "config.json").is_file():
        raise StartupError(
            f"{directory} holds no config.json: a model directory in Hugging Face format has one"
        )
    return directory


def _fetch(model: str, with_weights: bool) -> Path:
    """Download what a model needs, or find it in the hub's cache. Its progress bars go to standard error."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    left_out = _OTHER_HUB_FILES if with_weights else [*_OTHER_HUB_FILES, _WEIGHTS]
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=left_out))
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
