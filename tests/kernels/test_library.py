"""Which build of the kernels a process uses."""

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton_kernels.cpu import library
from baton_kernels.cpu.build import KernelsUnavailable, supported_levels
from baton_kernels.cpu.library import TilesDenied, cpu_kernels


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cpu_kernels.cache_clear()
    yield
    cpu_kernels.cache_clear()


def test_where_the_system_denies_amx_the_next_kind_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best = supported_levels()[0]
    monkeypatch.setattr(library, "supported_levels", lambda: [best, best])
    tried: list[Path] = []
    load = library.load

    def deny_once(path: Path) -> ctypes.CDLL:
        tried.append(path)
        if len(tried) == 1:
            raise TilesDenied("no")
        return load(path)

    monkeypatch.setattr(library, "load", deny_once)
    with caplog.at_level(logging.INFO, "baton_kernels.cpu.library"):
        kernels = cpu_kernels()
    if kernels is None:
        pytest.skip("no C compiler here")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "denies this process AMX" in caplog.records[0].getMessage()
    assert f"C kernels for {best.name} CPUs" in caplog.records[1].getMessage()


def test_no_build_is_tried_after_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> Path:
        raise KernelsUnavailable("broken")

    monkeypatch.setattr(library, "build", fail)
    assert cpu_kernels() is None
