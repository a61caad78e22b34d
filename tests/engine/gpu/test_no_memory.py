"""A GPU without room, at each stage of the start: one line that names what to change."""

import pytest
import torch

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.engine import factory
from baton.engine.attention import cuda
from baton.engine.attention.cuda import cuda_attention
from baton.engine.factory import load_engine
from baton.engine.pages.memory import room_for

OPTIONS = EngineConfig(kv_cache_bytes=4 << 20, device="cpu")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")


def fail(*_, **__):
    raise NO_MEMORY


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("load_weights", "the weights on cpu: stop other programs .*--dtype bf16"),
        ("_runner", "graphs and a first step on cpu: lower --gpu-memory-utilization.*--enforce-eager"),
        ("_warm_up", "graphs and a first step on cpu: lower --gpu-memory-utilization.*--enforce-eager"),
    ],
)
def test_each_stage_says_what_to_do(checkpoint, monkeypatch, stage, says):
    monkeypatch.setattr(factory, stage, fail)
    with pytest.raises(StartupError, match=f"There is no memory for {says}") as raised:
        load_engine(checkpoint("llama"), OPTIONS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"],
)
def test_the_drivers_and_libraries_words_are_known(words):
    with (
        pytest.raises(StartupError, match="no memory for it on cuda: do so"),
        room_for("it", torch.device("cuda"), "do so"),
    ):
        raise RuntimeError(words)


def test_a_capture_that_memory_ended_is_known():
    """Torch ends the capture all the same, and says only that it failed."""

    def capture():
        try:
            fail()
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(StartupError, match="no memory for it"), room_for("it", torch.device("cuda"), "do so"):
        capture()


def test_other_errors_stay_what_they_are():
    with (
        pytest.raises(RuntimeError, match="an illegal memory access"),
        room_for("it", torch.device("cuda"), "do so"),
    ):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_trial_without_memory_says_nothing_of_the_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "_trial_error", fail)
    with pytest.raises(torch.OutOfMemoryError):
        cuda_attention(torch.zeros(9, 2, 2, 2, 16, 32), (None, None))
