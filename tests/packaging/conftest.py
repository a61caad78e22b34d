"""What is built of the checkout, in a copy of it: a build writes stubs, which other tests are importing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.environments import PIP, TIMEOUT_S, Environment, run
from tests.packaging.projects import CLIENT, ROOT, Build, project
from tests.router_front.conftest import backend, model_dir, served, tokenizer  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips what needs one where there is none."""
    there = tmp_path_factory.mktemp("index")
    command = (*PIP, "download", "--quiet", "--no-deps", "--retries=0", "--timeout=10", "hatch-protobuf")
    done = subprocess.run(command, cwd=there, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[-1]}")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, without what git ignores: stubs are to come from the build."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    ignored = (".[!g]*", ".git", "__pycache__", "*_pb2*", "build", "dist", "node_modules")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
    return copy


@pytest.fixture(scope="session")
def build(package_index: None, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the wheel of a project in the checkout, by way of its source distribution."""
    tools = Environment.make(tmp_path_factory.mktemp("tools"))
    projects = (checkout, checkout / CLIENT)
    requirements = [name for each in projects for name in project(each)["build-system"]["requires"]]
    tools.pip("install", "--quiet", "build", *requirements)

    def build(directory: Path) -> Path:
        output = tmp_path_factory.mktemp("dist")
        command = (tools.python, "-m", "build", "--no-isolation", f"--outdir={output}", directory)
        run(*command, PATH=f"{tools.scripts}:{os.environ['PATH']}")  # protoc looks there for its plugins
        [wheel] = output.glob("*.whl")
        return wheel

    return build
