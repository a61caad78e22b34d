"""How long the simulation searches, and with which seed; it says both in the end."""

import random
from collections.abc import Callable
from functools import partial

import pytest

_SLOWEST_SCHEDULE_S = 0.02  # on a machine that has other things to do


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "num_schedules" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(120 + _num_schedules(config) * _SLOWEST_SCHEDULE_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, line in getattr(report, "user_properties", ()):
                if name == _SAID and report.when == "call":
                    terminalreporter.write_line(line)


@pytest.fixture
def num_schedules(request: pytest.FixtureRequest) -> int:
    """How many to try."""
    return _num_schedules(request.config)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What --hypothesis-seed says, or a new one."""
    given = request.config.getoption("--hypothesis-seed", default=None)
    return int(given) if given is not None else random.SystemRandom().getrandbits(32)


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print a line when all tests have run."""
    return partial(record_property, _SAID)


def _num_schedules(config: pytest.Config) -> int:
    return int(config.getoption("--schedules"))


_SAID = "said in the end"
