"""Start-up errors end as one line on standard error and exit code 2, without a traceback."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from baton.core.errors import StartupError
from baton_launch import main
from tests.free_ports import free_port


def baton(*arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BATON_CLUSTER_TOKEN": token, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "baton_launch.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def error_line(*arguments: str) -> str:
    done = baton(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr.strip()


def serve_error(model: str) -> str:
    return error_line("serve", model, f"--port={free_port()}", f"--grpc-port={free_port()}")


@pytest.mark.parametrize("model", ["./no-such-model", "/no/such/model", "~/no-such-model"])
def test_a_path_is_never_looked_up_on_the_hub(model: str) -> None:
    assert serve_error(model).startswith("baton: there is no model directory /")


def test_a_directory_that_holds_no_model(tmp_path: Path) -> None:
    assert "holds no config.json" in serve_error(str(tmp_path))


def test_what_can_be_no_model() -> None:
    assert "neither a directory nor a Hugging Face model id" in serve_error("a/b/c")


def test_an_unreachable_hub() -> None:
    line = serve_error("baton-test/no-such-model")
    assert line.startswith("baton: could not reach the Hugging Face hub to fetch 'baton-test/no-such-model'")


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_in_use(option: str, model_dir: Path, free_ports: tuple[int, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"--port": free_ports[0], "--grpc-port": free_ports[1], option: port}
        line = error_line("serve", str(model_dir), *(f"{name}={value}" for name, value in ports.items()))
    assert line == f"baton: port {port} on 127.0.0.1 is in use: choose another with {option}"


def test_the_same_port_twice(model_dir: Path) -> None:
    assert "can't share port 8001" in error_line("serve", str(model_dir), "--port=8001")


def test_a_host_that_is_elsewhere(model_dir: Path) -> None:
    assert "192.0.2.1" in error_line("serve", str(model_dir), "--host=192.0.2.1")


def test_a_worker_that_others_reach_needs_a_token(model_dir: Path) -> None:
    line = error_line("prefill", f"--model={model_dir}", "--listen=0.0.0.0:50051", "--advertise=a:50051")
    assert "set BATON_CLUSTER_TOKEN" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--role=cook"], "unknown role 'cook': use both, or --prefill and --decode without --role"),
        (["--role=both", "--prefill=1"], "--prefill and --decode don't go with --role both: use --workers"),
        (["--workers=2"], "--workers goes with --role both; else use --prefill and --decode"),
    ],
)
def test_roles_that_do_not_go_together(options: list[str], words: str, model_dir: Path) -> None:
    assert error_line("serve", str(model_dir), *options) == f"baton: {words}"


def test_a_worker_of_no_role(model_dir: Path) -> None:
    line = error_line("worker", f"--model={model_dir}", "--listen=unix:/tmp/w.sock", "--role=cook")
    assert line == "baton: unknown role 'cook': use prefill, decode, both"


def test_a_router_without_workers(model_dir: Path) -> None:
    assert "with --worker ADDRESS" in error_line("router", f"--model={model_dir}", "--prefill=p0:1")


@pytest.mark.parametrize("token", ["schlüssel", "two\nlines"])
def test_a_token_that_no_header_can_hold(token: str, model_dir: Path) -> None:
    done = baton("worker", f"--model={model_dir}", "--listen=unix:/tmp/w.sock", token=token)
    assert done.returncode == 2
    assert done.stderr == "baton: BATON_CLUSTER_TOKEN may hold printable ASCII characters only\n"


@pytest.mark.parametrize("threads", ["0", "100000"])
def test_threads_out_of_range(threads: str, model_dir: Path) -> None:
    done = baton("worker", f"--model={model_dir}", "--listen=unix:/tmp/w.sock", f"--threads={threads}")
    assert done.returncode == 2
    assert "--threads" in done.stderr


def test_a_size_that_is_none(model_dir: Path) -> None:
    assert "'lots' is not a size" in error_line("serve", str(model_dir), "--kv-cache-memory=lots")


def test_an_error_that_came_through_a_task_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(prog_name: str) -> None:
        raise ExceptionGroup("unhandled errors in a TaskGroup", [StartupError("no\nluck")])

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as exit:
        main.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == "baton: no luck\n"


def test_usage_errors_exit_with_2() -> None:
    assert baton("serve", "--no-such-option").returncode == 2
    assert baton("decode").returncode == 2
    assert "No such option: --role" in baton("decode", "--role=prefill").stderr


@pytest.mark.parametrize("command", ["serve", "chat", "router", "prefill", "decode", "worker"])
def test_help_shows_options_whole_on_a_narrow_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["baton", command, "--help"])
    with pytest.raises(SystemExit):
        main.main()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    parameters = typer.main.get_command(main.app).commands[command].params  # type: ignore[attr-defined]
    flags = {parameter.opts[0] for parameter in parameters if not parameter.hidden} - {"model"}
    assert flags <= set(re.findall(r"(?<= )--[a-z-]+", shown))


def test_version_and_help() -> None:
    assert baton("--version").stdout.startswith("baton 0.")
    helped = baton("--help")
    assert helped.returncode == 0
    assert all(
        command in helped.stdout for command in ("serve", "chat", "router", "prefill", "decode", "worker")
    )
