"""Compiles kernels for a Hopper GPU on a machine that has none, through the very calls that launch them.

Run as a program it compiles the launches of `launches.py`, with `--llama` only those of Llama 8B, and prints
a JSON object: of each kernel its shared memory, the time that it took and the instructions that matter.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


class _NoDriver:
    """Says what is to be compiled for, and has nothing to launch on."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[dict[str, dict[str, Any]]]:
    """Until it ends, launching a kernel compiles it only; what was compiled is collected."""
    compiled: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        started = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        milliseconds = round((time.perf_counter() - started) * 1000)
        name = f"{self.fn.__name__}#{sum(key.startswith(self.fn.__name__ + '#') for key in compiled)}"
        ptx = kernel.asm["ptx"]
        compiled[name] = {
            "shared": kernel.metadata.shared,
            "ms": milliseconds,
            "wgmma": "wgmma" in ptx,
            "mma": "mma.sync" in ptx,
            "cp_async": "cp.async" in ptx,
            "inexact_division": "div.full" in ptx,
            "vector_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
        }
        return kernel

    triton.runtime.driver.set_active(_NoDriver())
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    from tests.kernels.gpu.launches import launch_all

    with compiling() as figures:
        launch_all(llama_only="--llama" in sys.argv)
    print(json.dumps(figures, indent=1))
