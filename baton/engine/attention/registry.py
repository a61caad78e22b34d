"""Chooses the attention backend, once, at start."""

import logging
from importlib import import_module

from torch import Tensor

from baton.core.errors import StartupError
from baton.engine.attention.base import AttentionBackend

# Device type -> module and what makes the backend; imported when chosen, so that one device's packages are no
# other's need.
_BACKENDS = {
    "cpu": ("baton.engine.attention.c_kernels", "cpu_attention"),
    "cuda": ("baton.engine.attention.cuda", "cuda_attention"),
}

_logger = logging.getLogger(__name__)


def attention_backend(
    pool: Tensor, windows: tuple[int | None, ...], scales: tuple[float, ...] = ()
) -> AttentionBackend:
    """The backend for the device that the KV pool lies on. Raises StartupError if there is none.

    `scales`: of a float8 pool, as in `baton_kernels.reference`; `windows`: of each layer; None: all.
    """
    device = pool.device.type
    if device not in _BACKENDS:
        raise StartupError(
            f"There is no attention for device '{device}' yet; choose one of: {', '.join(_BACKENDS)}."
        )
    module, name = _BACKENDS[device]
    backend: AttentionBackend = getattr(import_module(module), name)(pool, windows, scales)
    _logger.info("attention: %s on %s", type(backend).__name__, pool.device)
    return backend
