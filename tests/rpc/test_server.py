"""Where a server can't listen it says so, and takes nothing from the one that does."""

import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.core.errors import StartupError
from baton.rpc.server import RpcServer


async def test_a_socket_that_is_served_is_left_to_its_server(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/worker.sock"
    first, second = RpcServer(), RpcServer()
    await first.start(address, (), "--listen")
    with pytest.raises(StartupError, match="is in use: choose another with --listen"):
        await second.start(address, (), "--listen")
    async with grpc.aio.insecure_channel(address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    await first.stop(0)


async def test_a_socket_that_a_dead_process_left_is_taken(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/worker.sock")
        left.listen()
    server = RpcServer()
    await server.start(f"unix:{tmp_path}/worker.sock", (), "--listen")
    await server.stop(0)


@pytest.mark.parametrize("name", ["no-such-directory/worker.sock", f"{'long' * 30}.sock"])
async def test_what_can_be_no_socket(tmp_path: Path, name: str) -> None:
    server = RpcServer()
    with pytest.raises(StartupError, match="the directory has to be there, and 107 characters are the most"):
        await server.start(f"unix:{tmp_path}/{name}", (), "--listen")
