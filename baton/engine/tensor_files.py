"""A checkpoint's safetensors files, under the names that a model that generates has for their tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.core.errors import StartupError

# What a base model alone calls without the prefix: its class has no other part beside it.
_PREFIX, _PARTS = "model.", ("embed_tokens.", "layers.", "norm.")


class TensorFile:
    """One file that is open; nothing of a tensor is read before it is asked for."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint
        self._stored = {_name_in_model(name): name for name in checkpoint.keys()}  # noqa: SIM118 - not a dict

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors, in the file's order."""
        return tuple(self._stored)

    def tensor(self, name: str) -> Tensor:
        """Read one."""
        tensor: Tensor = self._checkpoint.get_tensor(self._stored[name])
        return tensor

    def dtype(self, name: str) -> str:
        """One's dtype as safetensors calls it, from the file's header."""
        dtype: str = self._checkpoint.get_slice(self._stored[name]).get_dtype()
        return dtype


@contextmanager
def opened(file: Path) -> Iterator[TensorFile]:
    """A safetensors file to read tensors from; what goes wrong becomes a StartupError."""
    try:
        with safe_open(file, framework="pt", device="cpu") as checkpoint:
            yield TensorFile(checkpoint)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise StartupError(
            f"'{file}' is not a sound safetensors file ({reason}); download it again."
        ) from error


def tensor_names(files: tuple[Path, ...]) -> frozenset[str]:
    """Of all files together; only headers are read."""
    names: set[str] = set()
    for file in files:
        with opened(file) as checkpoint:
            names.update(checkpoint.names)
    return frozenset(names)


def _name_in_model(name: str) -> str:
    return f"{_PREFIX}{name}" if name.startswith(_PARTS) else name
