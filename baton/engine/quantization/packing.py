"""Chooses what multiplies a model's weights once they are loaded, and packs them for it."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from baton.core.errors import StartupError
from baton.engine.quantization.float8_linear import ALIGNMENT, Float8Linear, is_aligned
from baton_kernels.cpu.embedding import EmbeddingTable
from baton_kernels.cpu.library import DTYPES, adds_products_of_pairs, cpu_kernels, has_wide_vectors
from baton_kernels.cpu.linear import PackedInt8Linear, PackedLinear
from baton_kernels.quantization import float8_rows
from baton_kernels.reads import Normalise

_logger = logging.getLogger(__name__)


class Packed(Protocol):
    """A packed weight matrix `[out_features, in_features]`."""

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[T, in_features]` to `[T, out_features]`, plus `residual`."""
        ...


class OneDnnLinear:
    """A weight matrix in the layout that oneDNN chose for it, computed by torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Packed`."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, "none", [], "")
        return output if residual is None else output.add_(residual)


def pack(
    weight: Tensor, bias: Tensor | None, norm: Normalise | None, is_gated: bool
) -> tuple[Packed, bool] | None:
    """The packed weight, and whether it normalises and gates itself; None: nothing is gained by packing.

    Where the CPU multiplies no bfloat16, oneDNN converts it at every step, which costs several times the C
    kernels' whole work. Compiled for just any CPU, these gain nothing.
    """
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return None
    library = cpu_kernels() if has_wide_vectors() else None
    if library is not None:
        return PackedLinear(library, weight, bias, norm, is_gated), True
    if _has_onednn() and weight.dtype != torch.float16:
        return OneDnnLinear(weight, bias), False
    return None


def embedding_table(weight: Tensor) -> EmbeddingTable | None:
    """What looks tokens up in `[V, hidden_size]`; None: torch does."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or (library := cpu_kernels()) is None:
        return None
    return EmbeddingTable(library, weight, weight.shape[1], weight.dtype, is_packed=False)


def pack_int8(weight: Tensor, bias: Tensor | None, norm: Normalise | None, is_gated: bool) -> Packed:
    """The weight in 8 bits; it normalises and gates itself. Raises StartupError without C kernels."""
    library = cpu_kernels()
    if library is None:
        raise StartupError(
            "--quantization int8 needs Baton's C kernels, which could not be built; install a C compiler, or "
            "leave the option out."
        )
    _warn_where_slow()
    return PackedInt8Linear(library, weight, bias, norm, is_gated)


def pack_float8(weight: Tensor, bias: Tensor | None) -> tuple[Packed, bool] | None:
    """The weight rounded to 8-bit floats, which does not do what is read itself.

    None, and said so: it can't be.
    """
    if not is_aligned(*weight.shape):
        _logger.warning(
            "a matrix of %d x %d stays in %s, since 8-bit floats need multiples of %d: it gains nothing",
            *weight.shape, weight.dtype, ALIGNMENT,
        )  # fmt: skip
        return None
    return Float8Linear(*float8_rows(weight), bias), False


@cache
def _warn_where_slow() -> None:
    """One warning where 8-bit weights save memory and no time."""
    if not adds_products_of_pairs():
        _logger.warning(
            "8-bit weights take half the memory on this CPU but more time than bfloat16: twice as long for a "
            "token, three times for a prompt"
        )


@cache
def _has_onednn() -> bool:
    """Whether torch was built with the operators, and they work; one warning if not."""
    try:
        weight: Callable[..., Tensor] = torch.ops.mkldnn._reorder_linear_weight
        torch.ops.mkldnn._linear_pointwise(torch.ones(1, 8), weight(torch.ones(8, 8)), None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        _logger.warning("oneDNN packs no weights (%s): steps of few rows take about twice as long", reason)
        return False
    return True
