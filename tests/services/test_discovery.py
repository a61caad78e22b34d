"""Workers that a file or a name has come and go without a restart of the router."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.config import RouterConfig
from baton.core.errors import StartupError
from baton_router.workers import discovery, pool, worker_link
from baton_router.workers.discovery import LookupFailed, addresses_in
from baton_router.workers.pool import WorkerPool
from tests.services.cluster import Limits, Worker, until
from tests.services.fake_engine import CONFIG_DIGEST


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as made:  # sockets' paths have to be short
        yield Path(made)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(worker_link, "RECONNECT_DELAY_S", 0.01)


@asynccontextmanager
async def running(config: RouterConfig) -> AsyncIterator[WorkerPool]:
    made = WorkerPool(config, CONFIG_DIGEST)
    task = asyncio.create_task(made.run(lambda: None))
    try:
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def connected(made: WorkerPool) -> set[str]:
    return {link.address for link in made.links if link.worker is not None}


async def test_workers_come_and_go_with_a_file(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    listed = directory / "decodes"
    prefill = Worker("prefill", f"unix:{directory}/p", Limits())
    first, second = (Worker("decode", f"unix:{directory}/d{number}", Limits()) for number in range(2))
    listed.write_text(f"# the first\n{first.address}  # and a note\n\n{first.address}\n")
    workers = [prefill, first, second]
    for worker in workers:
        await worker.start()
    config = RouterConfig(directory, ("fake",), (prefill.address,), (f"file:{listed}",))
    async with running(config) as made:
        await until(lambda: connected(made) == {prefill.address, first.address})
        assert made.is_ready
        listed.write_text(f"{first.address}\n{second.address}\n")
        await until(lambda: connected(made) == {worker.address for worker in workers})
        listed.unlink()
        await until(lambda: "can't be read" in caplog.text)
        listed.write_text(f"{second.address}\n")
        for _ in range(3):
            assert await addresses_in(f"file:{listed}") == [second.address]
        assert first.address in connected(made), "its session says that it lives"
        await first.stop()
        await until(lambda: [link.address for link in made.decodes] == [second.address])
        assert made.is_ready
        assert "no longer named" in caplog.text
        assert caplog.text.count("can't be read") == 1
    for worker in (prefill, second):
        await worker.stop()


async def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, *_: object) -> list[tuple[object, ...]]:
        if host != "decode":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        hosts = ("10.0.0.7", "10.0.0.5", "fd00::5", "10.0.0.5")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await addresses_in("dns:decode:80") == ["10.0.0.5:80", "10.0.0.7:80", "[fd00::5]:80"]
    with pytest.raises(LookupFailed, match=r"'nobody' has no address: .*not known"):
        await addresses_in("dns:nobody:80")
    assert await addresses_in("host:80") == ["host:80"]


async def test_this_machine_has_a_name() -> None:
    assert "127.0.0.1:80" in await addresses_in("dns:localhost:80")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"host", "no address"), (b"\xff\xfe", "can't be read"), (b"h:1\n" * 400_000, "more than")],
)
async def test_a_file_that_names_no_workers(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "workers").write_bytes(content)
    with pytest.raises(LookupFailed, match=reason):
        await addresses_in(f"file:{tmp_path}/workers")


async def test_a_name_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_LOOKUP_TIMEOUT_S", 0.01)
    asked = asyncio.Event()

    async def never(*_: object, **__: object) -> None:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never, raising=False)
    with pytest.raises(LookupFailed, match="no answer"):
        await addresses_in("dns:slow:80")
    assert asked.is_set()


@pytest.mark.parametrize("source", ["dns:decode", "dns::80", "dns:decode:x", "file:relative", "dns:a:b:80"])
def test_what_names_no_workers(source: str) -> None:
    with pytest.raises(StartupError, match="names no workers"):
        RouterConfig(Path("/m"), ("m",), worker_addresses=(source,))
