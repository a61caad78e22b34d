"""Long heads, and offers to speak another protocol, on raw connections to the real server."""

import asyncio
import json
import logging

import httpx
import pytest

from baton_launch.logging_setup import set_up_logging

DEADLINE_S = 10
BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
LENGTH = b"Content-Length: %d" % len(BODY)
# What Java's HttpClient sends to servers without TLS.
OFFER = (
    b"POST /v1/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n" + LENGTH + b"\r\n"
    b"Host: x\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
    b"Content-Type: application/json\r\n\r\n"
)


class Connection:
    """Bytes to the server, and its answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> "Connection":
        address = httpx.URL(url)
        return cls(*await asyncio.open_connection(address.host, address.port))

    async def send(self, data: bytes, piece: int | None = None) -> None:
        for start in range(0, len(data), piece or len(data)):
            self.writer.write(data[start : start + (piece or len(data))])
            await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the next one."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            return int(head.split()[1]), await self.reader.readexactly(length)

    def close(self) -> None:
        self.writer.close()


def assert_completed(answer: tuple[int, bytes]) -> None:
    status, body = answer
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("piece", [1, 7, 100, None])
async def test_an_offer_of_http_2_is_passed_over(base_url: str, piece: int | None) -> None:
    """Twice on one connection."""
    connection = await Connection.open(base_url)
    for _ in range(2):
        await connection.send(OFFER + BODY, piece)
        assert_completed(await connection.answer())
    connection.close()


async def test_offers_one_after_the_other_without_waiting(base_url: str) -> None:
    connection = await Connection.open(base_url)
    await connection.send((OFFER + BODY) * 3)
    for _ in range(3):
        assert_completed(await connection.answer())
    connection.close()


async def test_an_offer_before_a_chunked_body(base_url: str) -> None:
    connection = await Connection.open(base_url)
    head = OFFER.replace(LENGTH, b"Transfer-Encoding: chunked")
    await connection.send(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
    assert_completed(await connection.answer())
    connection.close()


async def test_offers_fill_no_log(base_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    set_up_logging()
    try:
        connection = await Connection.open(base_url)
        await connection.send(OFFER + BODY)
        assert_completed(await connection.answer())
        connection.close()
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ],
    ids=["websocket", "tunnel"],
)
async def test_other_protocols_are_not_spoken(base_url: str, head: bytes, status: int) -> None:
    connection = await Connection.open(base_url)
    await connection.send(head)
    assert (await connection.answer())[0] == status
    connection.close()


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"a: b\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\na: ", b"bbbbbbb"),
        (b"GET /", b"bbbbbbb"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n",
            b"a: b\r\n",
        ),
    ],
    ids=["headers", "a value", "a path", "trailers"],
)
async def test_a_head_without_end_is_cut(base_url: str, start: bytes, more: bytes) -> None:
    connection = await Connection.open(base_url)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ConnectionError):
            await connection.send(start + more * 2_000_000, 100_000)  # 12 MB and more
    connection.close()


async def test_large_bodies_and_usual_heads_are_taken(base_url: str) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2, "user": "u" * 3_000_000}).encode()

    async def in_pieces():
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    async with httpx.AsyncClient(base_url=base_url) as client:
        for content in (body, in_pieces()):
            assert (await client.post("/v1/completions", content=content)).status_code == 200
        assert (await client.get("/health", headers={"x": "y" * 30_000})).status_code == 200
