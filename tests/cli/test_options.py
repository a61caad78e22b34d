"""The table of options: what is made from it, and that nothing goes past it."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from baton.config import EngineConfig, RouterConfig, WorkerConfig
from baton.core.errors import StartupError
from baton.core.reservation import TransferDeadlines
from baton.front_config import FrontConfig
from baton.option import REQUIRED, arguments_of, check_options, make_config, option, settings_of
from baton.option_values import ADDRESSES, POSITIVE, SIZE, choice
from baton_launch.main import app
from baton_launch.options import takes_options
from baton_launch.serve import DECIDED_HERE
from tools.options_reference import PAGE, reference

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@dataclass(frozen=True)
class OvenConfig:
    num_loaves: int = option("--loaves", 4, "Loaves that bake at once.", POSITIVE)
    heat: str = option("--heat", "top", "Where it comes from.", choice("heat", "top", "fan"))
    is_steamy: bool = option("--steam", False, "With steam.")
    recipe_bytes: int | None = option("--recipe-memory", None, "Such as 1KiB.", SIZE, unset="by length")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class BakeryConfig:
    name: str = option("--name", REQUIRED, "What the sign says.")
    oven: OvenConfig = field(default_factory=OvenConfig)
    mills: tuple[str, ...] = option("--mill", (), "Where flour comes from.", ADDRESSES)


def bake(*arguments: str) -> tuple[list[BakeryConfig], Any]:
    """The configs that a command which takes these options made, and how it ended."""
    made: list[BakeryConfig] = []
    bakery = typer.Typer()

    @bakery.command()
    @takes_options(settings_of(BakeryConfig))
    def command(is_open: bool = True, **values: Any) -> None:
        assert is_open
        made.append(make_config(BakeryConfig, values))

    return made, CliRunner().invoke(bakery, arguments, env={"COLUMNS": "200"})


def test_a_row_is_an_option_of_a_command() -> None:
    _, ended = bake("--help")
    for text in ("--loaves", "Loaves that bake at once.", "[default: 4]", "--mill", "--steam", "by length"):
        assert text in ended.stdout
    given = ("--loaves=2", "--recipe-memory=1KiB", "--mill=a:1", "--mill=b:1", "--steam")
    made, _ = bake("--name=Corner", *given)
    assert made == [BakeryConfig("Corner", OvenConfig(2, "top", True, 1024), ("a:1", "b:1"))]


def test_what_is_not_given_has_its_default() -> None:
    assert bake("--name=Corner")[0] == [BakeryConfig("Corner")]
    assert "Missing option '--name'" in bake()[1].stderr


def test_what_a_row_does_not_take_is_refused_everywhere() -> None:
    assert "loaves must be at least 1, but is 0" in str(bake("--name=x", "--loaves=0")[1].exception)
    assert str(bake("--name=x", "--heat=sun")[1].exception) == "unknown heat 'sun': use top, fan"
    with pytest.raises(StartupError, match="loaves must be at least 1, but is 0"):
        OvenConfig(num_loaves=0)


@pytest.mark.parametrize(
    "config",
    [
        BakeryConfig("Corner"),
        BakeryConfig("it's a corner", OvenConfig(2, "fan", True, 1024), ("a:1", "b:1")),
    ],
)
def test_the_arguments_of_a_child_make_the_same_config(config: BakeryConfig) -> None:
    assert bake(*arguments_of(config))[0] == [config]


OTHER_ENGINE = EngineConfig(
    "bfloat16", 32, 1 << 20, 2, 3, 4, 5, Path("/cores"), "cpu", 0.25, True, "int8", "float8_e4m3fn"
)
DEADLINES = TransferDeadlines.at_most(7.5)
OTHER_WORKER = WorkerConfig(
    "both", Path("/m"), "unix:/w", "unix:/v", "w", "", OTHER_ENGINE, "nixl", 2.5, DEADLINES
)
OTHER_ROUTER = RouterConfig(Path("/m"), ("m", "n"), ("p:1",), ("d:1",), ("w:1", "v:1"), "::1", 1, 2, 3, 4)
OTHER_FRONT = FrontConfig(
    "baton", '{"top_k": 5}', 7, True, ("https://a",), ("GET", "POST"), (), True, "/llm", True, True
)


@pytest.mark.parametrize("config", [OTHER_WORKER, OTHER_ROUTER, replace(OTHER_ROUTER, front=OTHER_FRONT)])
def test_options_survive_the_way_to_a_child(config: WorkerConfig | RouterConfig) -> None:
    settings = settings_of(type(config))
    command = COMMANDS["worker" if isinstance(config, WorkerConfig) else "router"]
    given = command.make_context("baton", arguments_of(config)).params
    values = {setting.field: setting.read(given[setting.field]) for setting in settings}
    assert make_config(type(config), values | {"model_dir": Path(values["model_dir"])}) == config


@pytest.mark.parametrize("config", [EngineConfig, FrontConfig, WorkerConfig, RouterConfig])
def test_every_field_is_a_row(config: type) -> None:
    """But for the cluster's token, which is no argument."""
    others = [row for row in fields(config) if "option" not in row.metadata and not is_dataclass(row.type)]
    assert [row.name for row in others] == (
        [] if config in (EngineConfig, FrontConfig) else ["cluster_token"]
    )


@pytest.mark.parametrize(
    ("command", "config", "without"),
    [
        ("worker", WorkerConfig, set()),
        ("prefill", WorkerConfig, {"role"}),
        ("decode", WorkerConfig, {"role"}),
        ("router", RouterConfig, set()),
        ("serve", WorkerConfig, DECIDED_HERE),
        ("serve", RouterConfig, DECIDED_HERE),
    ],
)
def test_every_command_has_the_options_of_its_config(command: str, config: type, without: set[str]) -> None:
    flags = [flag for parameter in COMMANDS[command].params for flag in parameter.opts]
    assert max(Counter(flags).values()) == 1
    rows = {setting.option.flag for setting in settings_of(config) if setting.field not in without}
    assert rows <= set(flags)


def test_serve_decides_of_options_that_there_are() -> None:
    known = {setting.field for setting in (*settings_of(WorkerConfig), *settings_of(RouterConfig))}
    assert known >= DECIDED_HERE


def test_what_must_be_given() -> None:
    required = [setting.option.flag for setting in settings_of(WorkerConfig) if setting.default is REQUIRED]
    assert required == ["--model", "--listen"]


@pytest.mark.parametrize("config", [WorkerConfig, RouterConfig])
def test_what_is_not_given_is_never_on(config: type) -> None:
    """A flag can only switch on."""
    assert not any(setting.default is True for setting in settings_of(config))


# Adds one row to EngineConfig and nothing else, then runs `baton serve`, and what its workers' arguments say.
ONE_MORE_ROW = """
import pathlib, sys, types

import baton

text = pathlib.Path(baton.__path__[0], "config.py").read_text()
before, place, after = text.partition("    enforce_eager:")
row = "    num_cooks: int = option('--cooks', 3, 'Cooks of one engine.', POSITIVE)\\n"
sys.modules["baton.config"] = types.ModuleType("baton.config")
exec(before + row + place + after, vars(sys.modules["baton.config"]))

from baton_launch import main, serve, worker_command
from tools.options_reference import reference

def run_workers(plan):
    for child in serve.child_specs(plan)[1:]:
        main.app(child.arguments[4:], standalone_mode=False)

serve.run_plan = run_workers
worker_command.die_with_parent = lambda pid: None
worker_command.run_worker = lambda config: print(config.role, config.engine.num_cooks)
print(reference().count("| `--cooks` | `3` | Cooks of one engine. |"))
main.main()
"""


def test_one_more_row_is_all_that_an_option_needs(model_dir: Path, free_ports: tuple[int, int]) -> None:
    ports = [f"--port={free_ports[0]}", f"--grpc-port={free_ports[1]}"]

    def serve(option: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", ONE_MORE_ROW, "serve", str(model_dir), option, *ports]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=PAGE.parents[1])

    assert serve("--cooks=5").stdout.split() == ["4", "prefill", "5", "decode", "5"]
    assert serve("--cooks=0").stderr == "baton: cooks must be at least 1, but is 0\n"


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "run python -m tools.options_reference"
