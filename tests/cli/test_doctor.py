"""`baton doctor` on this machine, and on ones that lack something."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from baton_launch import doctor as doctor_module
from baton_launch.doctor import Finding, Verdict, _of_computing, _of_limits, findings
from baton_launch.main import app

MACHINE: dict[str, Any] = {
    "torch": "2.9",
    "device": "cpu",
    "why_no_gpu": "no driver",
    "best_level": "avx2",
    "has_kernels": True,
    "why_no_kernels": None,
    "multiplies_bfloat16": True,
}


def on(monkeypatch: pytest.MonkeyPatch, **differences: Any) -> list[Finding]:
    """What is found of a machine that differs from MACHINE."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps(MACHINE | differences), "")

    monkeypatch.setattr(subprocess, "run", run)
    return list(_of_computing())


def test_this_machine() -> None:
    """It runs these tests, so nothing is bad."""
    found = list(findings(None, ()))
    assert all(finding.verdict is not Verdict.BAD for finding in found), found
    said = "\n".join(finding.what for finding in found)
    for part in ("Baton ", "PyTorch ", "device: ", "open files", "model baton-demo: 5 MiB"):
        assert part in said


def test_cpus_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.verdict for finding in on(monkeypatch)] == [Verdict.FINE] * 3
    gpu = on(monkeypatch, device="H200", why_no_gpu=None, has_kernels=False)
    assert [finding.what for finding in gpu] == ["PyTorch 2.9", "device: H200"]
    *_, slow = on(monkeypatch, has_kernels=False, why_no_kernels="no C kernels: there is no C compiler")
    assert (slow.verdict, slow.advice) == (Verdict.NOTE, "no C kernels: there is no C compiler")
    *_, old = on(monkeypatch, multiplies_bfloat16=False)
    assert (old.verdict, "int8" in old.advice) == (Verdict.NOTE, True)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="Traceback ...\nNo module named 'torch'\n")

    monkeypatch.setattr(subprocess, "run", run)
    [found] = _of_computing()
    assert (found.verdict, found.what) == (Verdict.BAD, "torch can't be used: No module named 'torch'")


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1_048_576))
    first, *_ = _of_limits()
    assert (first.verdict, first.advice) == (Verdict.NOTE, "ulimit -n 65536")


def test_the_exit_status_says_whether_something_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Iterator[Finding]:
        yield from ()

    monkeypatch.setattr(doctor_module, "_of_computing", nothing)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    result = CliRunner().invoke(app, ["doctor", "./nowhere", "--peer=127.0.0.1:1"])
    assert result.exit_code == 1
    assert " bad  there is no model directory" in result.output
    assert " bad  127.0.0.1:1 does not serve" in result.output
