"""The matrix products of a decode step of one row, at Llama 8B's shapes, beside torch's."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton_kernels.gpu import row_functions
from baton_kernels.gpu.one_row import one_row
from baton_kernels.reads import Normalise, Reads, SiluGate
from bench.gpu_figures import Figure

_NUM_WEIGHTS = 8  # read in turn, so that none is in the device's cache
_EPS = 1e-5


def products(
    device: torch.device, device_seconds: Callable[[Callable[[], object]], float]
) -> Iterator[Figure]:
    """Bytes of weights read, over time; torch's with the kernels that it needs around them."""
    states = torch.randn(1, 2 * 14_336, device=device, dtype=torch.bfloat16)
    norm = Normalise(torch.ones(4096, device=device, dtype=torch.bfloat16), _EPS)
    shapes: tuple[tuple[str, int, int, Reads | None], ...] = (
        ("norm, QKV", 6144, 4096, norm),
        ("output", 4096, 4096, None),
        ("norm, gate and up", 28_672, 4096, norm),
        ("gate, down", 4096, 14_336, SiluGate()),
    )
    for name, outputs, inputs, reads in shapes:
        weights = [
            torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) for _ in range(_NUM_WEIGHTS)
        ]
        width = 2 * inputs if isinstance(reads, SiluGate) else inputs
        row = states[:, :width].contiguous()
        for whose, product in (("Baton's", one_row), ("torch's", _of_torch)):
            work = partial(_all, product, row, weights, reads)
            rate = sum(weight.nbytes for weight in weights) / device_seconds(work)
            yield Figure(f"one row, {name}, {whose}", rate / 1e9, "GB/s")


def _all(product: Callable[..., Tensor], row: Tensor, weights: list[Tensor], reads: Reads | None) -> None:
    for weight in weights:
        product(row, weight, None, reads)


def _of_torch(row: Tensor, weight: Tensor, bias: Tensor | None, reads: Reads | None) -> Tensor:
    if isinstance(reads, Normalise):
        row = row_functions.rms_norm(row, reads.weight, reads.eps)
    elif reads is not None:
        row = row_functions.gated_silu(row)
    return F.linear(row, weight, bias)
