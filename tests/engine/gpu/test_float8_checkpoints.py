"""Checkpoints in FP8 whose own bits are multiplied: by a GPU, or by a CPU that is said to do so as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.core.plan import ScheduledRow, StepPlan
from baton.engine import factory
from baton.engine.factory import load_engine
from baton.engine.inputs import build_inputs
from baton.engine.layers.linear import Linear
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.models.decoder import Decoder
from baton.engine.quantization.float8_linear import Float8Linear
from baton_kernels.quantization import float8_rows
from tests.checkpoints import write_float8
from tests.engine.driver import make_prompt
from tests.float8_products import require_products

CPU = torch.device("cpu")
FUSED = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)

Load = Callable[..., Any]


@pytest.fixture
def load(device, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a checkpoint onto a device that multiplies float8, or that does not."""

    def load_onto(directory: Path, *, has_float8: bool = True, dtype: str = "bfloat16") -> Any:
        if has_float8 and dtype == "bfloat16":
            require_products(device)
        monkeypatch.setattr(factory, "multiplies_float8", lambda device: has_float8)
        config = EngineConfig(
            device=device.type, dtype=dtype, kv_cache_bytes=4 << 20, enforce_eager=True
        )  # fmt: skip
        return load_engine(directory, config).runner

    return load_onto


def linears(decoder: Decoder, layer: int) -> tuple[Linear, ...]:
    """In the order of FUSED."""
    attention, mlp = decoder._layers[layer]._attention, decoder._layers[layer]._mlp
    return attention._qkv, attention._output, mlp._gate_up, mlp._down


def are_float8(decoder: Decoder, layer: int) -> list[bool]:
    return [isinstance(linear._packed, Float8Linear) for linear in linears(decoder, layer)]


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def logits(runner: Any) -> Tensor:
    """float64 `[T, V]` of every position of a prompt."""
    cache, prompt = runner._cache, make_prompt(40)
    plan = StepPlan((ScheduledRow(prompt, 0, list(range(cache.layout.blocks_for(40))), ()),))
    with torch.inference_mode():
        inputs = build_inputs(plan, cache.layout.block_size, cache.padding_block, cache.pool.device)
        step = runner._attention.begin_step(inputs.attention)
        hidden = runner._decoder.forward(inputs.token_ids, inputs.positions, step)
        return runner._decoder.logits(hidden).double()


@pytest.mark.parametrize("scale_shape", ["tensor", "channel"])
def test_the_checkpoints_own_bits_are_multiplied(tmp_path, caplog, load, scale_shape) -> None:
    caplog.set_level("INFO")
    directory = write_float8(tmp_path, scale_shape)
    decoder = load(directory)._decoder
    stored = load_file(directory / "model.safetensors")
    for layer in range(3):
        for linear, parts in zip(linears(decoder, layer), FUSED, strict=True):
            names = [
                name for part in parts for name in stored
                if name.startswith(f"model.layers.{layer}.") and name.endswith(f"{part}.weight")
            ]  # fmt: skip
            bits = torch.cat([stored[name].view(torch.uint8) for name in names])
            assert isinstance(linear._packed, Float8Linear)
            assert torch.equal(linear._packed._weight.t().view(torch.uint8).cpu(), bits)
            scales = [stored[f"{name}_scale"].flatten().expand(len(stored[name])) for name in names]
            assert torch.equal(linear._packed._scales[0].cpu(), torch.cat(scales))
    assert "21 matrices of the checkpoint that are in FP8 are multiplied as they are" in caplog.messages


@pytest.mark.parametrize("scale_shape", ["tensor", "channel"])
def test_logits_are_nearly_those_of_converted_weights(tmp_path, load, scale_shape) -> None:
    directory = write_float8(tmp_path, scale_shape)
    converted, kept = logits(load(directory, has_float8=False)), logits(load(directory))
    assert not torch.equal(converted, kept)
    assert torch.cosine_similarity(converted, kept).mean() > 0.98


def test_a_fused_matrix_that_is_partly_float8_is_converted(tmp_path, caplog, load) -> None:
    caplog.set_level("INFO")
    directory = write_float8(tmp_path, "channel")
    exact = logits(load(directory, has_float8=False))
    name = "model.layers.1.self_attn.k_proj.weight"

    def convert(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name].float() * tensors.pop(f"{name}_scale")).bfloat16()

    edit(directory, convert)
    caplog.clear()
    runner = load(directory)
    assert are_float8(runner._decoder, 0) == [True] * 4
    assert are_float8(runner._decoder, 1) == [False, True, True, True]
    assert torch.cosine_similarity(exact, logits(runner)).mean() > 0.98
    assert {message for message in caplog.messages if "in FP8" in message} == {
        "18 matrices of the checkpoint that are in FP8 are multiplied as they are",
        "2 matrices of the checkpoint that are in FP8 are converted to bfloat16 as they are loaded",
    }


def test_sides_that_are_no_multiple_of_16_are_converted(tmp_path, load) -> None:
    """Only the last matrix is read along a side of 104; gate and up are 208 together."""
    runner = load(write_float8(tmp_path, "tensor", intermediate_size=104))
    assert are_float8(runner._decoder, 0) == [True, True, True, False]


def test_products_are_of_bfloat16_only(tmp_path, load) -> None:
    runner = load(write_float8(tmp_path, "tensor"), dtype="float32")
    assert are_float8(runner._decoder, 0) == [False] * 4


@pytest.mark.parametrize(
    ("scale", "words"),
    [(None, r"q_proj.weight' has no '.*q_proj.weight_scale'"), (torch.ones(2, 1), r"has shape \[2, 1\]")],
)
def test_scales_that_are_missing_or_of_another_shape(tmp_path, load, scale, words) -> None:
    directory = write_float8(tmp_path, "channel")
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    edit(directory, lambda tensors: tensors.pop(name) if scale is None else tensors.update({name: scale}))
    with pytest.raises(StartupError, match=words):
        load(directory)


def test_weights_of_another_shape_are_refused(tmp_path, load) -> None:
    directory = write_float8(tmp_path, "tensor")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(directory, lambda tensors: tensors.update({name: tensors[name][:32].clone()}))
    with pytest.raises(StartupError, match=r"up_proj.weight' has shape \[32, 64\], but"):
        load(directory)


def test_quantization_to_float8_rounds_only_what_is_not_in_it() -> None:
    placement = ParameterPlacement(torch.bfloat16, CPU, "fp8", frozenset({"x.a", "x.b"})).within("x.")
    kept = Linear(32, {"a": 48, "b": 16}, False, placement)
    rounded = Linear(32, {"c": 48}, False, placement)
    bits, scales = float8_rows(torch.randn(64, 32))
    for name, tensor in kept.checkpoint_tensors():
        source = scales if name.endswith("_scale") else bits
        tensor.copy_(source[:48] if name.startswith("a.") else source[48:])
    [(name, weight)] = rounded.checkpoint_tensors()
    assert (name, weight.dtype) == ("c.weight", torch.bfloat16)
    weight.normal_()
    kept.pack()
    rounded.pack()
    assert isinstance(kept._packed, Float8Linear)
    assert isinstance(rounded._packed, Float8Linear)
    assert torch.equal(kept._packed._weight.t().view(torch.uint8), bits.view(torch.uint8))
    assert torch.equal(kept._packed._scales[0], scales)
