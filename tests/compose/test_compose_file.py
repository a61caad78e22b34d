"""What deploy/compose starts can be started; whether it serves: try_compose.py, with a real engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from baton.config import RouterConfig
from baton.worker_sources import check_source
from baton_launch.main import app

DEPLOY = Path(__file__).parents[2] / "deploy"
STACK: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
SERVICES: dict[str, Any] = STACK["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}")


def arguments_of(service: str) -> list[str]:
    """Of a service's command, with variables' defaults in their places."""
    return [VARIABLE.sub(lambda match: match[2] or "", word) for word in SERVICES[service]["command"]]


@pytest.mark.parametrize("service", ["router", "prefill", "decode"])
def test_commands_are_commands(service: str) -> None:
    name, *arguments = arguments_of(service)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_parser(typer.Context(command)).parse_args(arguments)


def test_the_router_looks_for_services_that_there_are() -> None:
    sources = [
        word.partition("=")[2] for word in arguments_of("router") if word.startswith(("--pre", "--dec"))
    ]
    for source in sources:
        check_source(source)
    RouterConfig(Path("/m"), ("m",), (sources[0],), (sources[1],))
    names = {source.split(":")[1]: source.split(":")[2] for source in sources}
    assert set(names) == {"prefill", "decode"}
    for service, port in names.items():
        assert f"--listen=0.0.0.0:{port}" in arguments_of(service)
        assert SERVICES[service]["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"


def test_containers_have_no_rights_that_they_do_not_need() -> None:
    for name, service in SERVICES.items():
        assert service.get("read_only") is True or name == "grafana", name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
    for port in (port for service in SERVICES.values() for port in service.get("ports", ())):
        assert VARIABLE.sub(lambda match: match[2] or "", port).startswith("127.0.0.1:"), port
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    last_stage = dockerfile.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root|0)", last_stage, re.MULTILINE)
    assert "gcc" not in last_stage


def test_gpus_are_for_services_that_there_are() -> None:
    override = yaml.safe_load((DEPLOY / "compose" / "compose.gpu.yaml").read_text())
    assert set(override["services"]) <= set(SERVICES)
