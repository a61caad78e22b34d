"""Starts deploy/compose with a real Docker engine and takes containers away under load:

    python -m tests.compose.try_compose IMAGE

Streams run all the while; a decode and a prefill container are killed in mid-stream, decode is scaled from 2
to 4 and to 1. Every answer has to be whole. Says what it sees; the exit status is 1 where an answer was not.
"""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

COMPOSE_FILE = Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml"
START_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 180.0
NUM_CLIENTS = 8
MAX_TOKENS = 400
ANSWERS_BETWEEN_STEPS = 3 * NUM_CLIENTS


class Stack:
    """One project of Compose, on a port that is free."""

    def __init__(self, image: str) -> None:
        self._project = f"baton-try-{secrets.token_hex(4)}"
        self._command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        self._environment = os.environ | {
            "BATON_IMAGE": image,
            "BATON_CLUSTER_TOKEN": secrets.token_hex(16),
            "BATON_PUBLISH": "127.0.0.1:",
            "BATON_PUBLISH_GRPC": "127.0.0.1:",
            "BATON_KV_CACHE_MEMORY": "128MiB",
        }

    def compose(self, *arguments: str) -> str:
        """What the command prints. Raises CalledProcessError."""
        command = [*self._command, "--project-name", self._project, "--file", str(COMPOSE_FILE), *arguments]
        return subprocess.run(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=STEP_TIMEOUT_S,
        ).stdout

    def up(self, num_decodes: int) -> None:
        """Start what is missing, and stop what is too many."""
        self.compose("up", "--detach", "--no-recreate", "--scale", f"decode={num_decodes}")

    def url(self) -> str:
        """Of the router."""
        return f"http://{self.compose('port', 'router', '8000').strip()}"

    def containers(self, service: str) -> list[str]:
        """Ids of those that run."""
        return self.compose("ps", "--quiet", service).split()

    def kill(self, service: str) -> None:
        """kill -9 of one container."""
        subprocess.run(["docker", "kill", self.containers(service)[0]], check=True, stdout=subprocess.DEVNULL)


@dataclass
class Load:
    """Clients that ask again and again, and what has come of it."""

    url: str
    whole: int = 0
    failures: list[str] = field(default_factory=list)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def client(self, number: int) -> None:
        """One of them."""
        async with httpx.AsyncClient(timeout=60.0, trust_env=False) as http:
            while not self._ended.is_set():
                try:
                    await self._one(http, number)
                    self.whole += 1
                except (httpx.HTTPError, AssertionError, ValueError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self._news.set()

    async def _one(self, http: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "baton-demo",
            "prompt": f"{number} import os\n" * 40,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        num_tokens, reason = 0, None
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise AssertionError(f"status {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise AssertionError(event["error"]["message"])
                for choice in event["choices"]:
                    num_tokens += len(choice["token_ids"])
                    reason = choice["finish_reason"] or reason
        if (num_tokens, reason) != (MAX_TOKENS, "length"):
            raise AssertionError(f"an answer of {num_tokens} tokens that ended by {reason}")

    async def go_on(self, more: int = ANSWERS_BETWEEN_STEPS) -> None:
        """Wait for so many answers."""
        end = self.whole + len(self.failures) + more
        async with asyncio.timeout(STEP_TIMEOUT_S):
            while self.whole + len(self.failures) < end:
                self._news.clear()
                await self._news.wait()

    def end(self) -> None:
        """No client asks again."""
        self._ended.set()


def workers(url: str) -> Counter[str]:
    """How many of each role are connected."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    up = [line for line in text.splitlines() if line.startswith("baton_worker_up{") and line.endswith(" 1.0")]
    return Counter(role for line in up for role in ("prefill", "decode") if f'role="{role}"' in line)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Look again until it holds. Raises TimeoutError."""
    end = time.monotonic() + STEP_TIMEOUT_S
    while not await asyncio.to_thread(condition):
        if time.monotonic() > end:
            raise TimeoutError(what)
        await asyncio.sleep(0.5)


async def try_it(stack: Stack) -> list[str]:
    """Every failure."""
    started = time.monotonic()
    await asyncio.to_thread(stack.up, 2)
    url = await asyncio.to_thread(stack.url)
    await until(lambda: answers(url), "a first answer")
    took_s = time.monotonic() - started
    print(f"first answer after {took_s:.1f} s (at most {START_TIMEOUT_S:.0f} are allowed)", flush=True)
    load = Load(url)
    clients = [asyncio.create_task(load.client(number)) for number in range(NUM_CLIENTS)]

    async def step(what: str, action: Callable[[], None], expected: dict[str, int] | None = None) -> None:
        await asyncio.to_thread(action)
        if expected is not None:
            await until(lambda: workers(url) == expected, f"{expected} after: {what}")
        await load.go_on()
        connected = dict(workers(url))
        print(f"{what}: {connected}, {load.whole} whole answers, {len(load.failures)} failed", flush=True)

    await until(lambda: workers(url) == {"prefill": 2, "decode": 2}, "all workers")
    await step("all are there", lambda: None)
    await step("a decode container is killed", lambda: stack.kill("decode"), {"prefill": 2, "decode": 1})
    await step("it is started again", lambda: stack.up(2), {"prefill": 2, "decode": 2})
    await step("a prefill container is killed", lambda: stack.kill("prefill"), {"prefill": 1, "decode": 2})
    await step("it is started again", lambda: stack.up(2), {"prefill": 2, "decode": 2})
    await step("decode is scaled to 4", lambda: stack.up(4), {"prefill": 2, "decode": 4})
    await step("decode is scaled to 1", lambda: stack.up(1), {"prefill": 2, "decode": 1})
    load.end()
    await asyncio.gather(*clients)
    print(f"at the end: {load.whole} whole answers, {len(load.failures)} failed", flush=True)
    return load.failures + ([f"the first answer took {took_s:.0f} s"] if took_s > START_TIMEOUT_S else [])


def answers(url: str) -> bool:
    """Whether a completion comes now."""
    body = {"model": "baton-demo", "prompt": "import", "max_tokens": 1}
    try:
        return (
            httpx.post(f"{url}/v1/completions", json=body, timeout=30.0, trust_env=False).status_code == 200
        )
    except httpx.TransportError:
        return False


def main() -> None:
    """Run it, and leave nothing behind."""
    stack = Stack(sys.argv[1])
    try:
        failures = asyncio.run(try_it(stack))
    except BaseException:
        print(stack.compose("logs", "--tail", "30"))
        raise
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")
    for failure in failures:
        print(failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
