"""Building the C kernels: what is kept, and what is said where they can't be built."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton_kernels.cpu import build as build_module
from baton_kernels.cpu.build import LEVELS, SOURCES, KernelsUnavailable, Level, build, sources
from baton_kernels.cpu.library import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_empty_cache")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -x")
    with pytest.raises(
        KernelsUnavailable, match=r"no C compiler 'no-such-compiler': .*apt install build-essential"
    ):
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


@pytest.mark.usefixtures("_empty_cache")
def test_what_the_package_ships_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "SHIPPED", tmp_path / "built")
    monkeypatch.setattr(build_module, "LEVELS", LEVELS[-1:])
    [made] = build_module.build_all()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build(LEVELS[-1]) == made
    load(made)
