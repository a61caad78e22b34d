"""Steps that are recorded have the tokens of steps that are computed call by call."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from baton.config import EngineConfig
from baton.core.sampling import SamplingParams
from baton.engine.cpu.runner import ModelRunner
from baton.engine.factory import Engine, load_engine
from baton_kernels.cpu.library import cpu_kernels
from tests.checkpoints import write_checkpoint
from tests.engine.driver import GREEDY_LOGPROBS, Driver, Request, make_prompt

DRAWN = SamplingParams(temperature=0.8, top_p=0.9)
RULED = SamplingParams(temperature=0.0, repetition_penalty=1.2)

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="no C kernels here")


def requests() -> list[Request]:
    params = (GREEDY_LOGPROBS, DRAWN, RULED, GREEDY_LOGPROBS)
    lengths = (45, 3, 17, 1)
    return [Request(make_prompt(length, length), p) for length, p in zip(lengths, params, strict=True)]


def generated(engine: Engine) -> list[Request]:
    made = requests()
    Driver(engine).generate(made, 8, chunk=7)  # decode beside chunks of prompts, some of which sample nothing
    return made


def call_by_call(engine: Engine) -> Engine:
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    assert runner._recorded is not None
    runner._recorded = None
    return engine


@pytest.mark.parametrize("name", ["llama-tied-bias", "mistral-window-of-some-layers", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_has_the_same_tokens(engine: Callable[..., Engine], name: str, options: dict[str, str]) -> None:
    recorded, plain = generated(engine(name, **options)), generated(call_by_call(engine(name, **options)))
    assert [request.sampled for request in recorded] == [request.sampled for request in plain]


def test_a_larger_step_is_computed_call_by_call(engine: Callable[..., Engine]) -> None:
    small = engine("qwen3", dtype="float32", max_num_batched_tokens=7, max_num_seqs=2)
    expected = generated(engine("qwen3", dtype="float32"))
    assert [request.output for request in generated(small)] == [request.output for request in expected]


def test_what_no_kernel_computes_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_checkpoint(tmp_path, architecture="LlamaForCausalLM", hidden_act="gelu")
    with caplog.at_level(logging.INFO, "baton.engine.cpu.recorded_step"):
        loaded = load_engine(directory, EngineConfig(kv_cache_bytes=4 * 2**20))
    [record] = [record for record in caplog.records if record.name == "baton.engine.cpu.recorded_step"]
    assert "call by call: aten.gelu" in record.getMessage()
    [request] = made = [Request(make_prompt(5, 5))]
    Driver(replace(loaded)).generate(made, 3)
    assert len(request.output) == 3
