"""Chooses the attention backend, once, at start."""

import logging

from torch import Tensor

from baton.core.errors import StartupError
from baton.engine.attention.base import AttentionBackend

_logger = logging.getLogger(__name__)


def attention_backend(pool: Tensor, windows: tuple[int | None, ...]) -> AttentionBackend:
    """The backend for the device that the KV pool lies on. Raises StartupError if there is none."""
    device = pool.device.type
    if device not in _BACKENDS:
        raise StartupError(
            f"There is no attention for device '{device}' yet; choose one of: {', '.join(_BACKENDS)}."
        )
    backend = _BACKENDS[device](pool, windows)
    _logger.info("attention: %s on %s", type(backend).__name__, pool.device)
    return backend


# Modules are imported when chosen, so that one device's packages are no other's need.
def _cpu(pool: Tensor, windows: tuple[int | None, ...]) -> AttentionBackend:
    from kernels.cpu.library import cpu_kernels

    library = cpu_kernels()
    if library is None:
        from baton.engine.attention.cpu import CpuAttention

        return CpuAttention(pool, windows)
    from baton.engine.attention.cpu_kernels import CpuKernelAttention

    return CpuKernelAttention(library, pool, windows)


def _cuda(pool: Tensor, windows: tuple[int | None, ...]) -> AttentionBackend:
    from baton.engine.attention.cuda import cuda_attention

    return cuda_attention(pool, windows)


_BACKENDS = {"cpu": _cpu, "cuda": _cuda}
