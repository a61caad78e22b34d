"""What examples/ tells people to run, against real processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import ROOT, Cluster

EXAMPLES = ROOT / "examples"
INSTALL_TIMEOUT_S = 90


def run(cluster: Cluster, *command: str | Path, cwd: Path = EXAMPLES) -> str:
    environment = {**os.environ, "BATON_URL": cluster.url, "BATON_GRPC": cluster.grpc_address}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(cluster: Cluster) -> None:
    completion, *events = run(cluster, EXAMPLES / "curl.sh").splitlines()
    assert json.loads(completion)["usage"]["completion_tokens"] == 24
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
    assert len(chunks) > 5
    assert [event for event in events if event][-1] == "data: [DONE]"


def test_openai_client(cluster: Cluster) -> None:
    completion, chat = run(cluster, sys.executable, EXAMPLES / "openai_client.py").split("\n", 1)
    assert completion
    assert chat.strip()


def test_grpc_client(cluster: Cluster) -> None:
    assert run(cluster, sys.executable, EXAMPLES / "grpc_client.py").endswith("24 tokens, ended by length\n")


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")
@pytest.mark.timeout(INSTALL_TIMEOUT_S + 90)
def test_node_grpc_client(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "node", tmp_path / "examples" / "node")
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    there = tmp_path / "examples" / "node"
    try:
        install = ("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--no-update-notifier")
        subprocess.run(install, cwd=there, capture_output=True, check=True, timeout=INSTALL_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm can't install the client's packages: {error}")
    assert run(cluster, "node", "grpc_client.mjs", cwd=there).endswith("24 tokens, ended by length\n")
