"""C kernels against `baton_kernels.reference` and torch in float64, for every kind of CPU that this is."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton_kernels.cpu.build import (
    LEVELS,
    SOURCES,
    KernelsUnavailable,
    Level,
    build,
    sources,
    supported_levels,
)
from baton_kernels.cpu.library import load, openmp_functions
from tests.kernels.cases import (
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

ROOT = Path(__file__).parents[2]


BEST = supported_levels()[0]


def emulated(name: str, without: str, definition: str) -> Level:
    """The best level that this CPU can run `without` a feature, which C emulates where that is defined."""
    level = next(level for level in supported_levels() if without not in level.needs)
    return Level(name, level.needs, (*level.flags, f"-D{definition}"))


# What a CPU that multiplies bfloat16 runs, but for that one instruction.
PAIRS = emulated("bfloat16-pairs", "avx512_bf16", "EMULATE_BFLOAT16_PRODUCTS")
# What a CPU with AMX runs, but for its tiles, whose loads no sanitizer sees.
EMULATED_AMX = emulated("emulated-amx", "amx_tile", "EMULATE_AMX")

# What runs where no instruction set is known, as on Arm.
ANY = Level("any-cpu", (), ("-U__SSE2__",))


@pytest.fixture(
    params=[*supported_levels(), PAIRS, EMULATED_AMX, ANY], ids=lambda level: level.name, scope="module"
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
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
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


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_empty_cache")
@pytest.mark.parametrize(
    ("level", "count"),
    [(BEST, 15), (PAIRS, 15), (EMULATED_AMX, 6)],  # emulated tiles take long
    ids=lambda value: getattr(value, "name", None),
)
def test_nothing_is_read_or_written_out_of_bounds(level: Level, count: int) -> None:
    """Random cases in a process of its own, compiled with address and undefined-behaviour sanitizers."""
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    sanitizers = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build(Level(f"sanitized-{level.name}", level.needs, (*level.flags, *sanitizers)))
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.run_cases", str(library), str(count)],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == str(count)


@pytest.fixture
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_empty_cache")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -x")
    with pytest.raises(KernelsUnavailable, match="no C compiler 'no-such-compiler'"):
        build(LEVELS[-1])


@pytest.mark.usefixtures("_empty_cache")
def test_a_failing_build_gives_the_compilers_first_error() -> None:
    with pytest.raises(KernelsUnavailable, match=r"'cc' failed: .*error.*no-such-flag"):
        build(Level("broken", (), ("--no-such-flag",)))


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelsUnavailable, match="can't be written to"):
        build(LEVELS[-1])


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_empty_cache")
def test_many_processes_build_at_once(tmp_path: Path) -> None:
    program = "from baton_kernels.cpu.build import LEVELS, build; print(build(LEVELS[-1]))"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    [path] = paths
    load(Path(path))
    assert {file.name for file in Path(path).parent.iterdir()} == {Path(path).name, f"{Path(path).stem}.lock"}


@pytest.mark.usefixtures("_empty_cache")
def test_without_kernels_there_is_one_warning_and_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from baton.engine.attention.plain_torch import CpuAttention
    from baton.engine.attention.registry import attention_backend
    from baton_kernels.cpu.library import cpu_kernels

    monkeypatch.setenv("CC", "no-such-compiler")
    cpu_kernels.cache_clear()
    try:
        for _ in range(2):
            assert isinstance(attention_backend(torch.zeros(2, 1, 2, 1, 4, 8), (None,)), CpuAttention)
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "no-such-compiler" in warnings[0].getMessage()
        assert "slower" in warnings[0].getMessage()
    finally:
        cpu_kernels.cache_clear()


def test_sources_are_what_is_shipped() -> None:
    assert all(file.parent == SOURCES for file in sources("*.[ch]"))
