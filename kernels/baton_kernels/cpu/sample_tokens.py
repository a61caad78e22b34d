"""The next token of each row in C (sample_tokens.c), in a few passes over its logits."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton_kernels.cpu.library import DTYPES


@dataclass(frozen=True, slots=True)
class Drawn:
    """How one row's token is drawn.

    temperature: above 0. top_k: 0 is off; top_p: 1; min_p: 0. number: random in [0, 1).
    """

    line: int  # of the logits
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    number: float


class _Sampling(ctypes.Structure):
    """struct sampling"""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("depths", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def sample_tokens(library: ctypes.CDLL, logits: Tensor, rows: Sequence[Drawn]) -> Tensor:
    """One token id a row, int64 `[n]`. logits: `[lines, V]` on the CPU, of one of DTYPES, left unchanged.

    A number is met by the tokens' cumulative weight in the order of their ids. Raises MemoryError.
    """
    logits = logits.contiguous()
    tokens = torch.empty(len(rows), dtype=torch.int64)
    columns = (
        torch.tensor([row.line for row in rows]),
        torch.tensor([row.temperature for row in rows], dtype=torch.float32),
        torch.tensor([row.top_k for row in rows], dtype=torch.int32),
        torch.tensor([row.top_p for row in rows], dtype=torch.float64),
        torch.tensor([row.min_p for row in rows], dtype=torch.float32).log_().abs_(),
        torch.tensor([row.number for row in rows], dtype=torch.float64).mul_(2.0**53).long() << 11,
    )
    sampling = _Sampling(
        tokens.data_ptr(), logits.data_ptr(), len(rows), logits.shape[1],
        *(column.data_ptr() for column in columns), DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if library.baton_sample(ctypes.byref(sampling)):
        raise MemoryError("There is no memory to draw tokens in.")
    return tokens
