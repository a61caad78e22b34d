"""The built kernels in this process, on torch's own OpenMP threads."""

import ctypes
import logging
import platform
from functools import cache
from pathlib import Path
from typing import Final

import torch

from baton_kernels.cpu.build import KernelsUnavailable, build, supported_levels

_logger = logging.getLogger(__name__)

_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64
_Int = ctypes.c_int32

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dtype of vector.h
PAGE_DTYPES: Final = DTYPES | {torch.float8_e4m3fn: 3}
_SIGNATURES: Final = {
    "baton_use_threads": (None, (_Pointer,) * 3),
    "baton_use_amx": (ctypes.c_int, ()),
    "baton_lanes": (_Size, ()),
    "baton_packed_bytes": (_Size, (_Size, _Size, _Int)),
    "baton_pack": (None, (_Pointer, _Pointer, _Size, _Size, _Int, _Int)),
    "baton_run": (ctypes.c_int, (_Pointer, _Size, _Size, _Int)),
    "baton_sample": (ctypes.c_int, (_Pointer,)),
    "baton_logprobs": (ctypes.c_int, (_Pointer,)),
    "baton_allowed_rows": (None, (_Pointer,)),
    "baton_packed_bytes_int8": (_Size, (_Size, _Size)),
    "baton_pack_int8": (None, (_Pointer, _Pointer, _Pointer, _Size, _Size)),
}
# What a team of threads needs of an OpenMP runtime; GNU's, LLVM's and Intel's all have these.
_OPENMP_FUNCTIONS: Final = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class TilesDenied(KernelsUnavailable):
    """The system does not let this process use a CPU's tiles."""


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """The kernels for this CPU, built if need be; None, after one warning, where there can be none."""
    for level in supported_levels():
        try:
            library = load(build(level))
        except TilesDenied:
            _logger.warning("the system denies this process AMX, the tiles of %s CPUs", level.name)
            continue
        except KernelsUnavailable as reason:
            _logger.warning(
                "no C kernels: %s. Torch computes instead, which is several times slower on CPUs.", reason
            )
            break
        _logger.info("C kernels for %s CPUs", level.name)
        return library
    return None


def load(path: Path) -> ctypes.CDLL:
    """A library that `build` made. Raises KernelsUnavailable."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        library.baton_use_threads(*openmp_functions())
        if library.baton_use_amx():
            raise TilesDenied(f"'{path}' needs AMX, which the system denies this process")
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"'{path}' can't be loaded ({error})") from error
    return library


def openmp_functions() -> list[int | None]:
    """Addresses of the functions of the OpenMP runtime that torch runs on.

    Torch's own calls find them the same way: in what was preloaded, else in the runtime that torch brings.
    Raises AttributeError where torch has no OpenMP.
    """
    everything = ctypes.CDLL(None)
    return [ctypes.cast(getattr(everything, name), _Pointer).value for name in _OPENMP_FUNCTIONS]


def has_wide_vectors() -> bool:
    """Whether the kernels are compiled for a CPU whose vectors they know, and not for just any."""
    return bool(supported_levels()[0].needs)


def adds_products_of_pairs() -> bool:
    """Whether the kernels know an instruction that adds products of 16-bit integers up, as every x86 has."""
    return platform.machine() in ("x86_64", "AMD64")
