"""Generates the stubs of the public API from the file that the server's own are generated from."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = "baton/v1/inference.proto"


class StubsHook(BuildHookInterface):
    """Writes baton_client/v1/inference_pb2*, which git ignores, and has the wheel take them along."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built, be it editable."""
        root = Path(self.root)
        with TemporaryDirectory() as directory:
            generate(protos_for(root), Path(directory))
            for stub in sorted((Path(directory) / PROTO).parent.iterdir()):
                target = root / "baton_client" / "v1" / stub.name
                target.write_text(under_its_own_name(stub.read_text()))
                build_data["artifacts"].append(target.relative_to(root).as_posix())


def protos_for(root: Path) -> Path:
    """Where the protos are: a source distribution has its own, a checkout those of the server."""
    own = root / "protos"
    return own if own.is_dir() else root.parents[1] / "protos"


def generate(protos: Path, output: Path) -> None:
    """Run protoc, which writes into folders named as the proto's are."""
    kinds = ("python", "pyi", "grpc_python", "mypy_grpc")
    outputs = [f"--{kind}_out={output}" for kind in kinds]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={protos}", *outputs, PROTO]
    subprocess.run(command, check=True)


def under_its_own_name(stub: str) -> str:
    """The stub as a module of `baton_client.v1`.

    The proto keeps its name: under two, its messages could not share a process with the server's.
    """
    imports = stub.replace("from baton.v1 import", "from baton_client.v1 import")
    return imports.replace("'baton.v1.inference_pb2'", "'baton_client.v1.inference_pb2'")
