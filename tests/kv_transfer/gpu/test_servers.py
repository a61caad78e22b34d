"""A prefill and a decode server on one GPU say what one engine says there, whichever way pages take."""

import json
import random
from pathlib import Path

import pytest

WHY = "servers need what Baton does: pip install ."
for package in ("crc32c", "uvloop", "typer", "fastapi", "grpc_health", "grpc_reflection"):
    pytest.importorskip(package, reason=WHY)
httpx = pytest.importorskip("httpx", reason=WHY)

from baton.config import EngineConfig  # noqa: E402
from baton.core.sampling import SamplingParams  # noqa: E402
from baton_kv_transfer.transports.nixl import library as nixl_library  # noqa: E402
from tests.colocated import ColocatedEngine  # noqa: E402
from tests.e2e.processes import DEMO_MODEL, Cluster, running_cluster  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

MAX_TOKENS = 32
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(not nixl_library.is_available(), reason="NIXL is not installed")
)


def prompts() -> list[list[int]]:
    chosen = random.Random(3)
    vocabulary = json.loads((Path(DEMO_MODEL) / "config.json").read_text())["vocab_size"]
    return [[chosen.randrange(4, vocabulary) for _ in range(length)] for length in (1, 16, 97, 300)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """One engine's greedy tokens."""
    config = EngineConfig(dtype="float32", device="cuda", kv_cache_bytes=64 << 20, max_num_batched_tokens=96)
    engine = ColocatedEngine(DEMO_MODEL, config, num_blocks=256)
    return engine.token_ids(prompts(), SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))


def ask(cluster: Cluster, prompt: list[int]) -> list[int]:
    body = {
        "model": "demo", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0.0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


def require_alike(cluster: Cluster, expected: list[list[int]]) -> None:
    """Batches differ, and so do the last bits of sums; a page that is wrong changes nearly every token."""
    answers = [ask(cluster, prompt) for prompt in prompts()]
    matches = [
        a == b
        for ours, theirs in zip(answers, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert sum(matches) >= 60 / 64 * len(matches), answers


@pytest.mark.parametrize("transport", ["grpc", "cuda_ipc", NIXL])
def test_same_tokens_also_after_a_prefill_server_was_killed(
    transport: str, expected: list[list[int]]
) -> None:
    flags = (
        "--dtype=float32", "--device=cuda", "--kv-cache-memory=64MiB",
        "--max-num-batched-tokens=96", "--enforce-eager", f"--kv-transport={transport}",
    )  # fmt: skip
    with running_cluster(DEMO_MODEL, *flags) as cluster:
        require_alike(cluster, expected)
        carried = {name: value for name, value in cluster.metrics().items() if "transport_bytes" in name}
        assert [name for name, value in carried.items() if value and f'"{transport}"' in name], carried
        if transport == "cuda_ipc":  # whose memory decode has mapped
            cluster.kill("prefill")
            cluster.start_worker("prefill")
            cluster.wait_ready()
            require_alike(cluster, expected)
