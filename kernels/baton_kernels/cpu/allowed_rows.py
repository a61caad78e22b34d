"""Rows of logits less the tokens that masks forbid, in C (allowed_rows.c): torch needs ten calls for it."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from baton_kernels.cpu.library import DTYPES


class _AllowedRows(ctypes.Structure):
    """struct allowed_rows"""

    _fields_ = [
        ("to", ctypes.c_void_p),
        ("from_", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


def allowed_rows(
    library: ctypes.CDLL, logits: Tensor, lines: Sequence[int], masks: Sequence[bytes | None]
) -> Tensor:
    """Those lines as finite float32 `[n, V]`, in which what is forbidden is less than all else, NaN included.

    logits: `[lines, V]` on the CPU, of one of DTYPES, left unchanged. masks: of each line a bit a token, the
    lowest ids in the lowest bits; None: all tokens are allowed. Raises ValueError where a mask is too short.
    """
    logits = logits.contiguous()
    size = logits.shape[1]
    if any(mask is not None and len(mask) * 8 < size for mask in masks):
        raise ValueError(f"a mask has less than {size} bits")
    rows = torch.empty(len(lines), size)
    chosen = (ctypes.c_int64 * len(lines))(*lines)
    pointers = (ctypes.c_char_p * len(lines))(*masks)
    call = _AllowedRows(
        rows.data_ptr(), logits.data_ptr(), len(lines), size, ctypes.addressof(chosen),
        ctypes.addressof(pointers), DTYPES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip
    library.baton_allowed_rows(ctypes.byref(call))
    return rows
