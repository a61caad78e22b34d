"""Ctrl-C while a model loads: nobody waits for the rest of it."""

import signal
from pathlib import Path
from types import ModuleType

import pytest

import both_service.main
import decode_service.main
import prefill_service.main
from baton.config import Role, WorkerConfig


@pytest.mark.parametrize(
    ("role", "service"),
    [
        ("prefill", prefill_service.main),
        ("decode", decode_service.main),
        ("both", both_service.main),
    ],
)
def test_ctrl_c_ends_the_loading(
    role: Role, service: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_engine(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on loading")

    monkeypatch.setattr(service, "load_engine", load_engine)
    address = f"unix:{tmp_path}/worker.sock"
    with pytest.raises(KeyboardInterrupt):
        service.run(WorkerConfig(role, tmp_path, address, address, "worker"))
