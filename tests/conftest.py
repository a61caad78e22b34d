"""GPU kernels run under Triton's interpreter where there is no GPU; tests that need one are skipped there."""

import logging
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background jobs; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


if find_spec("triton") is None:  # there is none for this system
    collect_ignore = [
        "kernels/gpu",
        "engine/gpu",
        "bench/test_gpu_check.py",
        "bench/test_gpu_transfers.py",
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schedules", type=int, default=10_000, help="schedules that the simulation tries")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if find_spec("triton") is None:
        terminalreporter.write_line("Triton is not installed: the tests of GPU kernels were left out")


# What starts many processes, compiles kernels or interprets them: folders, and files of others.
SLOW = (
    *("bench", "e2e", "engine/gpu", "faults", "kernels/gpu", "kv_transfer/gpu", "packaging", "parity"),
    *("cli/test_chat.py", "cli/test_serve.py", "engine/test_model_parity.py", "kernels/test_build.py"),
    *("kv_transfer/test_nixl_memory.py", "kv_transfer/test_process_group.py"),
    "services/test_device_pages.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    slow = tuple(here / path for path in SLOW)
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)
        if not HAS_CUDA and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(autouse=True)
def _levels_of_loggers() -> Iterator[None]:
    """A test that sets logging up, as commands do, does it for itself alone."""
    ours = [name for name in logging.root.manager.loggerDict if name.startswith("baton")]
    loggers = [logging.root, *map(logging.getLogger, ours)]
    levels = [logger.level for logger in loggers]
    yield
    known = {logger.name for logger in loggers}
    new = [name for name in logging.root.manager.loggerDict if name.startswith("baton") and name not in known]
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for name in new:
        logging.getLogger(name).setLevel(logging.NOTSET)
