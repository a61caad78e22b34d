"""What Baton uses of the package crc32c, compiled by the system's compiler, which Triton needs as well."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def _load() -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or "clang"
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "crc32c.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(
            [compiler, "-O2", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True
        )
        return ctypes.CDLL(str(library))


_crc32c = _load().baton_crc32c
_crc32c.restype, _crc32c.argtypes = ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32)


def crc32c(data: Any, value: int = 0) -> int:
    """Of a buffer that follows what has `value`."""
    numbers = np.frombuffer(data, dtype=np.uint8)
    crc: int = _crc32c(numbers.ctypes.data, numbers.size, value)
    return crc
