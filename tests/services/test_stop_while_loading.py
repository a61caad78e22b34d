"""Ctrl-C while a model loads: nobody waits for the rest of it."""

import signal
from pathlib import Path

import pytest

import baton_prefill_service.main
from baton import worker_process
from baton.config import WorkerConfig


def test_ctrl_c_ends_the_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_engine(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on loading")

    monkeypatch.setattr(worker_process, "load_engine", load_engine)
    address = f"unix:{tmp_path}/worker.sock"
    with pytest.raises(KeyboardInterrupt):
        baton_prefill_service.main.run(WorkerConfig("prefill", tmp_path, address, address, "worker"))
