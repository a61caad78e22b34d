"""Log probabilities of chosen tokens, and the likeliest ones, in C (logprobs.c)."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton_kernels.cpu.library import DTYPES

_ONE = 2.0**40  # what the likeliest token weighs


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, of which line of the logits it is, and how many of the likeliest are wanted beside it."""

    line: int
    token_id: int
    count: int


class _Logprobs(ctypes.Structure):
    """struct logprobs"""

    _fields_ = [
        ("totals", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("depths", ctypes.c_void_p),
        ("likeliest", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def logprobs(
    library: ctypes.CDLL, logits: Tensor, rows: Sequence[Chosen]
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each row its token's log probability, and (token, log probability) of the likeliest, these first.

    logits: `[lines, V]` on the CPU, of one of DTYPES. Of equals the lowest ids are the likelier ones; NaN
    counts as the least likely, infinities as finite. Raises MemoryError.
    """
    logits = logits.contiguous()
    size = logits.shape[1]
    counts = [min(row.count, size) for row in rows]
    stride = max(counts, default=0)
    totals = torch.empty(len(rows), dtype=torch.int64)
    chosen, depths = torch.empty(len(rows)), torch.empty(len(rows), stride)
    likeliest = torch.empty(len(rows), stride, dtype=torch.int64)
    columns = (
        torch.tensor([row.line for row in rows]),
        torch.tensor([row.token_id for row in rows]),
        torch.tensor(counts),
    )
    call = _Logprobs(
        totals.data_ptr(), chosen.data_ptr(), depths.data_ptr(), likeliest.data_ptr(), logits.data_ptr(),
        len(rows), size, stride,
        *(column.data_ptr() for column in columns), DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if library.baton_logprobs(ctypes.byref(call)):
        raise MemoryError("There is no memory to look for log probabilities.")
    found = []
    for index, (total, own) in enumerate(zip(totals.tolist(), chosen.tolist(), strict=True)):
        log_total = math.log(total / _ONE)
        token_ids = likeliest[index, : counts[index]].tolist()
        values = [-depth - log_total for depth in depths[index, : counts[index]].tolist()]
        found.append((-own - log_total, tuple(zip(token_ids, values, strict=True))))
    return found
