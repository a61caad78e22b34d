"""baton-client: the stubs alone, where nothing else of Baton's is."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import grpc
import pytest

from baton.rpc.errors import ErrorInterceptor
from baton.v1 import inference_pb2_grpc
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from tests.packaging.environments import Environment
from tests.packaging.projects import CLIENT, ROOT, Build, project
from tests.packaging.readme_program import complaints, program_of

CONSTRAINTS = f"--constraint={ROOT / 'constraints.txt'}"
CALL = """
import sys

import grpc
from baton_client.v1 import inference_pb2 as pb
from baton_client.v1.inference_pb2_grpc import InferenceStub

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = InferenceStub(channel)
    [model] = stub.ListModels(pb.ListModelsRequest(), timeout=10).models
    request = pb.GenerateRequest(text="hello", sampling=pb.Sampling(max_tokens=3), stream=True)
    *_, last = stub.Generate(request, timeout=10)
    print(model.id, last.usage.completion_tokens, last.finish_reason)
    try:
        list(stub.Generate(pb.GenerateRequest(text="hello", sampling=pb.Sampling(top_p=7)), timeout=10))
    except grpc.RpcError as error:
        print(error.code().name)
"""
# Whichever comes first: one description of the proto, and messages that both take.
BOTH = """
from {first}.v1 import inference_pb2 as first, inference_pb2_grpc
from {second}.v1 import inference_pb2 as second, inference_pb2_grpc

assert first is not second
assert first.DESCRIPTOR.serialized_pb == second.DESCRIPTOR.serialized_pb
request = first.GenerateRequest(text="hello", sampling=first.Sampling(max_tokens=3))
assert second.GenerateRequest.FromString(request.SerializeToString()) == request
"""


@pytest.fixture(scope="module")
def wheel(build: Build, checkout: Path) -> Path:
    return build(checkout / CLIENT)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the client and what it says that it needs."""
    environment = Environment.make(tmp_path_factory.mktemp("client"))
    environment.pip("install", CONSTRAINTS, wheel)
    return environment


@pytest.fixture
async def address(served: ServedModel) -> AsyncGenerator[str]:
    """Of a router's gRPC door."""
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(served), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def test_it_follows_the_server() -> None:
    server, client = project(ROOT), project(ROOT / CLIENT)
    for field in ("version", "license", "requires-python"):
        assert client["project"][field] == server["project"][field]
    assert set(client["project"]["dependencies"]) < set(server["project"]["dependencies"])
    tools = [name for name in client["build-system"]["requires"] if name.startswith(("grpcio", "hatchling"))]
    assert set(tools) < set(server["build-system"]["requires"])
    assert (ROOT / CLIENT / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_it_is_the_public_stubs_alone(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {PurePosixPath(name) for name in archive.namelist()}
    inside = {str(name) for name in names if not name.parts[0].endswith(".dist-info")}
    stubs = {f"inference_pb2{suffix}" for suffix in (".py", ".pyi", "_grpc.py", "_grpc.pyi")}
    assert inside == {
        "baton_client/__init__.py",
        "baton_client/py.typed",
        *(f"baton_client/v1/{name}" for name in {"__init__.py"} | stubs),
    }


async def test_it_calls_a_router(installed: Environment, address: str) -> None:
    unwanted = installed.run_python(
        "-c", "from importlib.util import find_spec as f; print(f('torch'), f('baton'))"
    )
    assert unwanted == "None None\n"
    said = await asyncio.to_thread(installed.run_python, "-c", CALL, address)
    assert said == "tiny 3 length\nINVALID_ARGUMENT\n"


async def test_its_readme_is_right(installed: Environment, address: str) -> None:
    program = program_of("baton_client").replace("127.0.0.1:8001", address)
    assert (await asyncio.to_thread(installed.run_python, "-c", program)).startswith("hello world")


@pytest.mark.parametrize(("first", "second"), [("baton", "baton_client"), ("baton_client", "baton")])
def test_it_shares_a_process_with_the_server(installed: Environment, first: str, second: str) -> None:
    installed.run_python("-c", BOTH.format(first=first, second=second), PYTHONPATH=str(ROOT))


def test_its_calls_are_typed(installed: Environment, tmp_path: Path) -> None:
    installed.pip("install", CONSTRAINTS, "types-grpcio", "types-protobuf")
    program = program_of("baton_client")
    assert complaints(installed, program, tmp_path, "--strict") == ""
    wrong = complaints(installed, program.replace("part.text", "part.words"), tmp_path, "--strict")
    assert '"GenerateResponse" has no attribute "words"' in wrong
