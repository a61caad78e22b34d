"""Ctrl-C while a model loads: nobody waits for the rest of it."""

import signal
from pathlib import Path
from types import ModuleType

import pytest

import baton_both_service.main
import baton_decode_service.main
import baton_prefill_service.main
from baton.config import Role, WorkerConfig


@pytest.mark.parametrize(
    ("role", "service"),
    [
        ("prefill", baton_prefill_service.main),
        ("decode", baton_decode_service.main),
        ("both", baton_both_service.main),
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
