"""What a line of the log has, and which lines there are."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from baton_launch import console
from baton_launch.console import ConsoleReporter
from baton_launch.model_source import ModelSource
from baton_launch.serve import child_specs, serve_plan

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) (\S+) .*"
PROGRAM = """
import logging, sys
from baton_launch.logging_setup import set_up_logging

set_up_logging(sys.argv[1])
for name in ("baton_router.main", "baton.engine.loop", "elsewhere"):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, "something")
"""
OURS = ("baton_router.main", "baton.engine.loop")


@pytest.mark.parametrize(
    ("level", "ours", "elsewhere"), [("debug", 4, 3), ("info", 3, 3), ("warning", 2, 2), ("error", 1, 1)]
)
def test_lines_have_date_and_level_and_start_at_the_level_that_is_asked_for(
    level: str, ours: int, elsewhere: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, level], capture_output=True, text=True, timeout=60, check=True
    )
    found = [re.fullmatch(LINE, line) for line in done.stderr.splitlines()]
    assert all(found)
    names = [match[2] for match in found if match]
    assert {name: names.count(name) for name in names} == dict.fromkeys(OURS, ours) | {"elsewhere": elsewhere}


def test_what_serve_says_itself_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "_LastingConsole", lambda stderr: Console(file=written, width=40))
    reporter = ConsoleReporter({}, "banner")
    reporter.notice("starting")
    reporter.warning("prefill-0 was killed by SIGKILL; starting it again in 1 s")
    levels = [match[1] for match in re.finditer(LINE, written.getvalue())]
    assert levels == ["INFO", "WARNING"]


def test_every_child_of_serve_gets_the_level(tmp_path: Path) -> None:
    values = {"log_level": "debug", "gpu_memory_utilization": 0.9}
    plan = serve_plan(ModelSource(tmp_path, "m"), {"prefill": 1, "decode": 1}, tmp_path, values)
    children = child_specs(plan)
    assert len(children) == 3
    assert all("--log-level=debug" in child.arguments for child in children)
