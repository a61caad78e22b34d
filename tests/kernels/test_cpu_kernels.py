"""C kernels against `baton_kernels.reference` and torch in float64, for every kind of CPU that this is."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton_kernels.cpu.build import (
    LEVELS,
    KernelsUnavailable,
    Level,
    build,
    supported_levels,
)
from baton_kernels.cpu.library import load, openmp_functions
from tests.kernels.cases import (
    check_allowed_rows,
    check_argmax,
    check_attention,
    check_attention_float8,
    check_every_float8,
    check_gated_int8,
    check_int8_is_exact,
    check_int8_without_a_scale,
    check_linear,
    check_linear_int8,
)
from tests.kernels.drawn_tokens import check_drawn, check_draws_of_what_is_no_number, check_logprobs
from tests.kernels.levels import ANY, BEST, EMULATED_AMX, PAIRS


@pytest.fixture(
    params=[
        pytest.param(level, id=level.name, marks=() if level is BEST else pytest.mark.slow)
        for level in (*supported_levels(), PAIRS, EMULATED_AMX, ANY)
    ],
    scope="module",
)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    try:
        return load(build(request.param))
    except KernelsUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def _threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(20))
def test_linear(library: ctypes.CDLL, seed: int) -> None:
    check_linear(library, seed)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(20))
def test_linear_int8(library: ctypes.CDLL, seed: int) -> None:
    check_linear_int8(library, seed)
    check_int8_is_exact(library, seed)
    check_gated_int8(library, seed)


def test_linear_int8_without_a_scale(library: ctypes.CDLL) -> None:
    check_int8_without_a_scale(library)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(5))
def test_argmax(library: ctypes.CDLL, seed: int) -> None:
    check_argmax(library, seed)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(10))
def test_allowed_rows(library: ctypes.CDLL, seed: int) -> None:
    check_allowed_rows(library, seed)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(20))
def test_drawn_tokens(library: ctypes.CDLL, seed: int) -> None:
    check_drawn(library, seed)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(10))
def test_logprobs(library: ctypes.CDLL, seed: int) -> None:
    check_logprobs(library, seed)


def test_draws_of_what_is_no_number(library: ctypes.CDLL) -> None:
    check_draws_of_what_is_no_number(library)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(20))
def test_attention(library: ctypes.CDLL, seed: int) -> None:
    check_attention(library, seed)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("seed", range(20))
def test_attention_over_float8_pages(library: ctypes.CDLL, seed: int) -> None:
    check_attention_float8(library, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float8(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    check_every_float8(library, dtype)


def test_one_openmp_runtime_and_one_pool_of_threads() -> None:
    """Torch and the kernels run on the same threads: none are added by the kernels."""
    program = """
import os, torch
from pathlib import Path
from baton_kernels.cpu.library import cpu_kernels
from baton_kernels.cpu.linear import PackedLinear
torch.set_num_threads(3)
torch.randn(600, 600) @ torch.randn(600, 600)
torch.randn(3_000_000).exp()
before = len(os.listdir("/proc/self/task"))
library = cpu_kernels()
assert library is not None
for _ in range(3):
    PackedLinear(library, torch.randn(500, 300))(torch.randn(40, 300))
print(len(os.listdir("/proc/self/task")) - before)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].rpartition("/")[2]})
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("tells threads and libraries from /proc")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    added, runtimes = result.stdout.splitlines()
    assert added == "0"
    assert len(runtimes.split()) == 1


def test_openmp_functions_are_those_of_the_runtime_that_torch_runs_on() -> None:
    assert all(openmp_functions())


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_every_level_compiles_where_only_some_can_run(level: Level) -> None:
    if level.needs and platform.machine() != "x86_64":
        pytest.skip("compiles for x86")
    assert build(level).exists()
