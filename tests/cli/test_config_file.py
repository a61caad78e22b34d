"""Settings of the file, the environment and the command line: which holds, and what a wrong one is told."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from baton.config import RouterConfig
from baton.core.errors import StartupError
from baton.option import settings_of
from baton_launch.config_command import schema_of
from baton_launch.config_file import environment_of_children, settable, variable_of
from baton_launch.main import app
from baton_launch.options import takes_options

FILE = """
port = 9000
max_model_len = "2k"
allowed-origins = ["https://a"]

[serve]
prefill = 2
port = 9001
model = "here"

[router]
decode = ["dns:decode:80"]
log-level = "debug"
"""


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATON_CONFIG", raising=False)


def shown(*arguments: str) -> dict[str, tuple[str, str]]:
    """Value and origin by name."""
    result = CliRunner().invoke(app, ["config", "show", *arguments])
    if isinstance(result.exception, StartupError):
        raise result.exception
    assert result.exit_code == 0, result.output
    lines = [line.rpartition("  # ") for line in result.output.splitlines()]
    return {
        name: (value, origin) for setting, _, origin in lines for name, _, value in [setting.partition(" = ")]
    }


def ran_with(arguments: list[str]) -> Mapping[str, Any]:
    """What a command with the router's options gets."""
    program, found = typer.Typer(), dict[str, Any]()

    @program.command("router")
    @takes_options(settings_of(RouterConfig))
    def router(**values: Any) -> None:
        found.update(values)

    @program.command("other")
    def other() -> None:
        pass

    result = CliRunner().invoke(program, ["router", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found


def test_the_stronger_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("baton.toml").write_text(FILE)
    monkeypatch.setenv("BATON_PORT", "9002")
    monkeypatch.setenv("BATON_GRPC_PORT", "9003")
    assert shown()["port"] == ('"9002"', "environment")
    assert shown()["prefill"] == ("2", "baton.toml")
    assert shown()["model"] == ('"here"', "baton.toml")
    assert shown()["max-queue"] == ("4096", "default")
    assert shown("router")["decode"] == ('["dns:decode:80"]', "baton.toml")
    Path("baton.toml").unlink()
    assert shown()["prefill"] == ("(1)", "default")


def test_commands_get_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    file = 'port = 9000\nmodel = "m"\nmax_model_len = "2k"\nallowed-origins = ["https://a"]\n'
    Path("elsewhere.toml").write_text(file + '[router]\nprefill = "a:1"\n')
    monkeypatch.setenv("BATON_DECODE", "b:2 c:3")
    found = ran_with(["--config", "elsewhere.toml", "--max-queue=5"])
    assert (found["http_port"], found["max_model_len"], found["max_queue"]) == (9000, 2000, 5)
    assert found["allowed_origins"] == ("https://a",)
    assert (found["prefill_addresses"], found["decode_addresses"]) == (("a:1",), ("b:2", "c:3"))
    assert ran_with(["--config=elsewhere.toml", "--port=1"])["http_port"] == 1
    monkeypatch.setenv("BATON_CONFIG", "elsewhere.toml")
    assert ran_with([])["http_port"] == 9000


def test_an_empty_name_stands_for_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("baton.toml").write_text("port = 9000\n")
    assert ran_with(["--model=m"])["http_port"] == 9000
    monkeypatch.setenv("BATON_CONFIG", "")
    assert ran_with(["--model=m"])["http_port"] == 8000


WRONG: list[tuple[str, str]] = [
    ("prot = 9000", "prot is no setting; 'port' is one"),
    ("[serve]\nprefil = 2", r"\[serve\] prefil is no setting; 'prefill' is one"),
    ("[router]\nworkers = 2", r"\[router\] workers is no setting"),
    ("[rooter]\nport = 1", "rooter is no setting; 'router' is one"),
    ("port = ", "can't be read: Invalid value"),
    ("\x00", "can't be read"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG, ids=lambda value: str(value)[:20])
def test_what_is_wrong_in_a_file(text: str, reason: str) -> None:
    Path("baton.toml").write_text(text)
    with pytest.raises(StartupError, match=f"^baton.toml.*{reason}"):
        shown()


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(StartupError, match=r"nowhere.toml can't be read"):
        shown("--config", "nowhere.toml")
    with pytest.raises(StartupError, match="no command 'chat' with settings"):
        shown("chat")


def test_the_schema_is_of_the_file() -> None:
    schema = schema_of(settable(typer.main.get_command(app)))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(tomllib.loads(FILE.replace("_", "-"))))
    for wrong in ({"prot": 1}, {"port": "x"}, {"serve": {"prefil": 1}}, {"enforce-eager": 1}):
        assert list(validator.iter_errors(wrong)), wrong
    result = CliRunner().invoke(app, ["config", "schema"])
    assert json.loads(result.output) == schema


def test_children_have_their_command_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PORT", "1")
    monkeypatch.setenv("BATON_SHARE_CORES", "x")
    monkeypatch.setenv("BATON_CLUSTER_TOKEN", "secret")
    environment = environment_of_children()
    assert not {"BATON_PORT", "BATON_SHARE_CORES"} & set(environment)
    assert (environment["BATON_CONFIG"], environment["BATON_CLUSTER_TOKEN"]) == ("", "secret")


def test_no_two_options_share_a_variable() -> None:
    names = [variable_of(setting.option) for setting in settings_of(RouterConfig)]
    assert len(names) == len(set(names))
    assert "BATON_CLUSTER_TOKEN" not in names
    assert "BATON_CONFIG" not in names
