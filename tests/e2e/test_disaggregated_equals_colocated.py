"""Two servers over real gRPC say exactly what one engine says."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton import LLM, BeamSearchParams
from baton.config import EngineConfig
from baton.core.sampling import SamplingParams, choice_seed
from tests.colocated import ColocatedEngine
from tests.e2e.processes import DEMO_MODEL, Cluster, running_cluster

CONFIG = EngineConfig(dtype="float32", kv_cache_bytes=32 << 20, max_num_batched_tokens=96)
VOCABULARY = json.loads((Path(DEMO_MODEL) / "config.json").read_text())["vocab_size"]


@pytest.fixture(scope="module")
def float32_cluster() -> Iterator[Cluster]:
    flags = ("--dtype=float32", "--kv-cache-memory=32MiB", "--max-num-batched-tokens=96")
    with running_cluster(DEMO_MODEL, *flags) as cluster:
        yield cluster


def _prompts() -> list[list[int]]:
    random_ids = random.Random(3)
    lengths = (1, 15, 16, 17, 95, 96, 97, 300)
    return [[random_ids.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]


def _choices(cluster: Cluster, prompt: list[int], **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "ignore_eos": True, "return_token_ids": True, **fields}
    return (
        httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
        .raise_for_status()
        .json()["choices"]
    )


def test_workers_forget_what_they_have_computed(float32_cluster: Cluster) -> None:
    body = {"prompt": _prompts()[-1], "max_tokens": 2, "ignore_eos": True}

    def num_cached() -> int:
        answer = httpx.post(f"{float32_cluster.url}/v1/completions", json=body, timeout=60).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    num_cached()
    assert num_cached() > 200
    httpx.post(f"{float32_cluster.url}/reset_prefix_cache", timeout=60).raise_for_status()
    assert num_cached() == 0


def test_the_best_candidates_are_those_of_single_requests(float32_cluster: Cluster) -> None:
    prompt, settings = _prompts()[3], {"temperature": 1.0, "max_tokens": 20, "logprobs": 0}
    best = _choices(float32_cluster, prompt, **settings, seed=5, n=2, best_of=5)
    singles = [
        _choices(float32_cluster, prompt, **settings, seed=choice_seed(5, choice))[0] for choice in range(5)
    ]
    singles.sort(key=lambda choice: sum(choice["logprobs"]["token_logprobs"]), reverse=True)
    assert [choice["token_ids"] for choice in best] == [choice["token_ids"] for choice in singles[:2]]


def test_beams_are_those_of_one_engine(float32_cluster: Cluster) -> None:
    prompts = _prompts()[2:5]
    with LLM(str(DEMO_MODEL), dtype="float32", kv_cache_bytes=32 << 20) as llm:
        outputs = llm.beam_search(prompts, BeamSearchParams(3, 10, ignore_eos=True), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        found = _choices(float32_cluster, prompt, use_beam_search=True, n=3, max_tokens=10)
        assert [[*prompt, *choice["token_ids"]] for choice in found] == [
            sequence.tokens for sequence in output.sequences
        ]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": 99, "n": 2},
        {"temperature": 1.1, "seed": 7, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "seeded", "penalties"],
)
def test_same_tokens(float32_cluster: Cluster, sampling: dict[str, Any]) -> None:
    prompts = _prompts()
    params = SamplingParams(max_tokens=40, **sampling)
    expected = [
        [[token.token_id for token in choice] for choice in choices]
        for choices in ColocatedEngine(DEMO_MODEL, CONFIG).generate(prompts, params)
    ]

    def ask(prompt: list[int]) -> list[list[int]]:
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": 40,
            "ignore_eos": True,
            "return_token_ids": True,
            **sampling,
        }
        answer = httpx.post(f"{float32_cluster.url}/v1/completions", json=body, timeout=60).json()
        return [choice["token_ids"] for choice in answer["choices"]]

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == expected
    # And again on cached prefixes, where only missing blocks travel.
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == expected
