"""Forms of a request's first line, over a real socket."""

import asyncio
import json

import pytest

from tests.router_front.test_http_protocol import Connection


async def status_and_body(base_url: str, line: str) -> tuple[int, bytes]:
    connection = await Connection.open(base_url)
    try:
        connection.writer.write(f"{line} HTTP/1.1\r\nHost: baton\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(connection.reader.read(), 10)
    finally:
        connection.writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    "path", ["/health", "/live", "/ping", "/version", "/metrics", "/v1/models", "/v1/models/"]
)
async def test_head_is_get_without_its_body(base_url: str, path: str) -> None:
    status, body = await status_and_body(base_url, f"HEAD {path}")
    assert (status, body) == (200, b"")
    assert (await status_and_body(base_url, f"GET {path}"))[0] == 200


async def test_head_of_what_is_posted(base_url: str) -> None:
    assert (await status_and_body(base_url, "HEAD /v1/completions"))[0] == 405


@pytest.mark.parametrize(
    "target", ["http://baton/version", "HTTP://other:99/version", "https://baton/version?a=b"]
)
async def test_a_target_with_scheme_and_host(base_url: str, target: str) -> None:
    status, body = await status_and_body(base_url, f"GET {target}")
    assert status == 200
    assert b"version" in body


@pytest.mark.parametrize(
    "target", ["http://baton", "http://baton/", "http://baton/no/such", "http:///version/x"]
)
async def test_nothing_there(base_url: str, target: str) -> None:
    assert (await status_and_body(base_url, f"GET {target}"))[0] == 404


@pytest.mark.parametrize("line", ["POST /v1/completions/", "GET /health/", "GET //health", "OPTIONS *"])
async def test_nothing_is_sent_elsewhere(base_url: str, line: str) -> None:
    """A redirection would name an address that only this process sees, and its body says nothing."""
    status, body = await status_and_body(base_url, line)
    assert status == 404
    assert line.split()[1].encode() in body
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_the_list_of_models_with_a_slash(base_url: str) -> None:
    without, with_slash = [(await status_and_body(base_url, f"GET /v1/models{end}"))[1] for end in ("", "/")]
    assert with_slash == without
    assert b'"object":"list"' in without.replace(b" ", b"")


async def test_probes_are_not_counted(base_url: str) -> None:
    for path in ("/health", "/live", "/ping", "/metrics", "/version"):
        await status_and_body(base_url, f"GET {path}")
    counted = (await status_and_body(base_url, "GET /metrics"))[1].decode()
    lines = [line for line in counted.splitlines() if line.startswith("baton_http_requests_total")]
    assert [line.partition("endpoint=")[2].split(",")[0] for line in lines] == ['"/version"']
