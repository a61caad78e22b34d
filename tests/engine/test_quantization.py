"""Whole models with 8-bit weights."""

import json.decoder
import textwrap
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.core.kv_layout import FLOAT8
from baton.core.plan import ScheduledRow, StepPlan
from baton.engine.attention import c_kernels as cpu_kernels_attention
from baton.engine.cpu.runner import ModelRunner
from baton.engine.devices import multiplies_float8, require_float8, require_quantization
from baton.engine.factory import load_engine
from baton.engine.inputs import build_inputs
from baton.engine.layers.linear import Linear
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.quantization.checkpoint_scales import dequantized, require_readable_weights
from baton.engine.quantization.float8_linear import Float8Linear
from baton_kernels.cpu.library import cpu_kernels
from baton_kernels.quantization import float8_rows
from tests.checkpoints import write_checkpoint, write_float8
from tests.engine.driver import GREEDY_LOGPROBS, Driver, Request, make_prompt

DEMO_MODEL = Path(__file__).parents[2] / "baton" / "demo_model"
PROMPT_LEN = 300


def prompts() -> list[list[int]]:
    """What the shipped model was made for: Python's own library."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    sources = map(getsource, (json.decoder, textwrap))
    return [tokenizer.encode(source).ids[:PROMPT_LEN] for source in sources]


def logits(token_ids: list[int], **options: Any) -> Tensor:
    """float64 `[T, V]` of every position."""
    config = EngineConfig(dtype="bfloat16", kv_cache_bytes=8 << 20, max_model_len=512, **options)
    runner = load_engine(DEMO_MODEL, config).runner
    assert isinstance(runner, ModelRunner)
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
    assert torch.cosine_similarity(exact, rounded).mean() >= 0.9995
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) >= 0.9995


@pytest.mark.parametrize("prompt", [0, 1])
def test_a_float8_kv_cache_gives_nearly_the_same_logits(prompt: int) -> None:
    token_ids = prompts()[prompt]
    exact, rounded = logits(token_ids), logits(token_ids, kv_cache_dtype=FLOAT8)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded).mean() >= 0.99


def test_a_float8_kv_cache_holds_twice_the_tokens(engine, monkeypatch) -> None:
    """And a decode step computes the same by the C kernels and by torch."""
    request, other = (Request(make_prompt(50), GREEDY_LOGPROBS) for _ in range(2))
    fast = engine("qwen3-window", dtype="bfloat16", kv_cache_dtype=FLOAT8)
    assert fast.page_store.num_blocks >= 2 * engine("qwen3-window", dtype="bfloat16").page_store.num_blocks
    Driver(fast).generate([request], 8)
    monkeypatch.setattr(cpu_kernels_attention, "cpu_kernels", lambda: None)
    Driver(engine("qwen3-window", dtype="float32", kv_cache_dtype=FLOAT8)).generate([other], 1)
    assert request.output[0] == other.output[0]


@pytest.mark.parametrize("scale_shape", ["tensor", "channel"])
def test_a_float8_checkpoint_is_computed_as_its_numbers_say(tmp_path, caplog, scale_shape) -> None:
    """Against the same numbers stored in float32."""
    caplog.set_level("INFO")
    directory = write_float8(tmp_path / "float8", scale_shape)
    plain = write_checkpoint(tmp_path / "plain", dtype=torch.bfloat16)
    stored = load_file(directory / "model.safetensors")
    exact = {
        name: tensor.float() * stored.get(f"{name}_scale", torch.ones(1))
        for name, tensor in stored.items() if not name.endswith("_scale")
    }  # fmt: skip
    save_file(exact, plain / "model.safetensors")
    requests = []
    for model in (directory, plain):
        request = Request(make_prompt(20), GREEDY_LOGPROBS)
        loaded = load_engine(model, EngineConfig(dtype="float32", kv_cache_bytes=4 << 20))
        Driver(loaded).generate([request], 8)
        requests.append(request)
    assert requests[0].sampled == requests[1].sampled
    [line] = [record.getMessage() for record in caplog.records if "in FP8" in record.getMessage()]
    assert line.startswith("21 matrices")


def test_the_checkpoints_kv_scales_are_those_of_the_pages(tmp_path) -> None:
    directory = write_float8(tmp_path / "model", "tensor", {"k_scale": 0.25, "v_scale": 0.5})
    options = EngineConfig(kv_cache_bytes=4 << 20, kv_cache_dtype=FLOAT8)
    assert load_engine(directory, options).page_store.layout.scales == (1.0, 1.0, 0.25, 0.5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"blocks of \[128, 128\]"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}},
            },
            "int in 4 bits",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "strategy": "block"}}},
            },
            "scales by block",
        ),
    ],
)
def test_other_quantizations_are_refused_by_name(quantization, named) -> None:
    with pytest.raises(StartupError, match=named):
        require_readable_weights({"quantization_config": quantization})


def test_scales_of_another_shape_are_refused() -> None:
    weight = torch.zeros(32, 16, dtype=torch.float8_e4m3fn)
    with pytest.raises(StartupError, match=r"has shape \[2, 1\]; .* of its 32 outputs"):
        dequantized("w", weight, torch.ones(2, 1))
    with pytest.raises(StartupError, match="no 'w_scale'"):
        dequantized("w", weight, None)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_float8_products(num_rows) -> None:
    """What torch._scaled_mm makes on this device of weights and states that are rounded alike."""
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(48, 64, generator=generator).bfloat16()
    states, residual = (torch.randn(num_rows, n, generator=generator).bfloat16() for n in (64, 48))
    bias = torch.randn(48, generator=generator).bfloat16()
    (left, left_scales), (right, right_scales) = float8_rows(states), float8_rows(weight)
    exact = (left.double() * left_scales[:, None]) @ (right.double() * right_scales[:, None]).T
    exact += bias.double() + residual.double()
    output = Float8Linear(right, right_scales, bias)(states, residual).double()
    assert (output - exact).abs().max() < 2e-2 * exact.abs().max()
    plain = states.double() @ weight.double().T + bias.double() + residual.double()
    assert torch.cosine_similarity(output.flatten(), plain.flatten(), dim=0) > 0.998


def test_odd_sizes_stay_as_they_are(caplog) -> None:
    linear = Linear(40, {"a": 48}, False, ParameterPlacement(torch.bfloat16, torch.device("cpu"), "fp8"))
    linear.pack()
    assert linear.weight is not None
    [warning] = caplog.records
    assert "48 x 40 stays in torch.bfloat16" in warning.getMessage()


def test_each_device_has_its_quantization() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    require_quantization("int8", torch.float32, cpu)
    with pytest.raises(StartupError, match="--quantization int8 is for CPUs"):
        require_quantization("int8", torch.bfloat16, cuda)
    with pytest.raises(StartupError, match="fp8 is for GPUs; use int8"):
        require_quantization("fp8", torch.bfloat16, cpu)
    with pytest.raises(StartupError, match="use --dtype bf16"):
        require_quantization("fp8", torch.float16, cuda)


def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    with pytest.raises(StartupError, match=r"capability 8.0\) has no 8-bit floats"):
        require_float8(torch.device("cuda"))
    assert not multiplies_float8(torch.device("cuda"))


def test_8_bit_floats_are_multiplied_from_ada_on(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert multiplies_float8(torch.device("cuda"))
    assert not multiplies_float8(torch.device("cpu"))
