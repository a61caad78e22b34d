"""Whole models with 8-bit weights."""

import json.decoder
import textwrap
from inspect import getsource
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.core.plan import ScheduledRow, StepPlan
from baton.engine.devices import require_quantization
from baton.engine.factory import load_engine
from baton.engine.inputs import build_inputs
from kernels.cpu.library import cpu_kernels

DEMO_MODEL = Path(__file__).parents[2] / "baton" / "demo_model"
PROMPT_LEN = 300


def prompts() -> list[list[int]]:
    """What the shipped model was made for: Python's own library."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    sources = map(getsource, (json.decoder, textwrap))
    return [tokenizer.encode(source).ids[:PROMPT_LEN] for source in sources]


def logits(token_ids: list[int], **options: str) -> Tensor:
    """float64 `[T, V]` of every position."""
    config = EngineConfig(dtype="bfloat16", kv_cache_bytes=8 << 20, max_model_len=512, **options)
    runner = load_engine(DEMO_MODEL, config).runner
    cache = runner._cache
    plan = StepPlan((ScheduledRow(token_ids, 0, list(range(cache.layout.blocks_for(PROMPT_LEN))), ()),))
    with torch.inference_mode():
        inputs = build_inputs(plan, cache.layout.block_size, cache.padding_block, cache.pool.device)
        step = runner._attention.begin_step(inputs.attention)
        hidden = runner._decoder.forward(inputs.token_ids, inputs.positions, step)
        return runner._decoder.logits(hidden).double()


@pytest.mark.parametrize("prompt", [0, 1])
def test_int8_gives_the_shipped_models_logits(prompt: int) -> None:
    if cpu_kernels() is None:
        pytest.skip("no C kernels here")
    token_ids = prompts()[prompt]
    exact, rounded = logits(token_ids), logits(token_ids, quantization="int8")
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded).mean() >= 0.999
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) >= 0.999


def test_int8_is_for_cpus() -> None:
    require_quantization("int8", torch.device("cpu"))
    with pytest.raises(StartupError, match="--quantization int8 is for CPUs"):
        require_quantization("int8", torch.device("cuda"))
