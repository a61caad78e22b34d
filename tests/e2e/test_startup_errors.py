"""What can't be served is refused in one line that says what to do, with exit code 2 and no traceback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.processes import DEMO_MODEL
from tests.free_ports import free_port


def refusal(command: str, *arguments: str) -> str:
    """The one line on standard error."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "baton_launch.main", command, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=90,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("baton: ")]
    return line


def without_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()


def with_unknown_architecture(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["architectures"] = ["ParrotForCausalLM"]
    (model_dir / "config.json").write_text(json.dumps(config))


def with_missing_tensor(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_config, ["config.json"]),
        (with_unknown_architecture, ["ParrotForCausalLM", "LlamaForCausalLM"]),
        (with_missing_tensor, ["model.layers.0.mlp.up_proj.weight"]),
    ],
)
def test_a_damaged_model(tmp_path: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model_dir)
    damage(model_dir)
    line = refusal("prefill", "--model", str(model_dir), "--listen", f"unix:{tmp_path}/p.sock")
    assert all(word in line for word in words), line


def test_a_worker_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refusal("decode", "--model", str(DEMO_MODEL), "--listen", address)
    assert address in line
    assert "--listen" in line


def test_a_router_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        workers = ["--prefill", f"unix:{tmp_path}/p.sock", "--decode", f"unix:{tmp_path}/d.sock"]
        line = refusal("router", "--model", str(DEMO_MODEL), *workers, f"--port={port}")
    assert str(port) in line
    assert "--port" in line


def test_a_hub_id_without_a_hub() -> None:
    ports = [f"--port={free_port()}", f"--grpc-port={free_port()}"]
    assert "hub" in refusal("serve", "nobody/no-such-model", *ports).lower()
