"""A decoder whose layers add with GPU kernels gives what one without them gives."""

import pytest
import torch

from baton.config import EngineConfig
from baton.engine import layers
from baton.engine.factory import load_engine
from kernels.gpu import row_functions
from tests.engine.driver import Driver, Request, make_prompt


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_sum_is_added_where_it_is_normalised(checkpoint, device, monkeypatch, name):
    """Interpreted on the CPU: the kernels' tokens, of a prompt and of decode steps, are torch's."""
    if device.type == "cuda":
        pytest.skip("kernels are interpreted only where there is no GPU")
    monkeypatch.setattr(layers, "pack", lambda *_: None)
    options = EngineConfig(kv_cache_bytes=1 << 20, dtype="float32", device="cpu")
    outputs, num_sums = [], []
    add_rms_norm = row_functions.add_rms_norm

    def counted(*arguments):
        num_sums.append(1)
        return add_rms_norm(*arguments)

    monkeypatch.setattr(row_functions, "add_rms_norm", counted)
    for with_kernels in (False, True):
        with monkeypatch.context() as patch:
            if with_kernels:
                patch.setattr(layers, "has_gpu_kernels", lambda states: True)
            engine = load_engine(checkpoint(name), options)
            num_sums.clear()
            requests = [Request(make_prompt(length)) for length in (5, 12)]
            Driver(engine).generate(requests, 3)
            outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]
    # Each of three layers but the first reads two sums, and the first one reads one of them.
    assert len(num_sums) == 3 * (2 * 3 - 1)


def test_states_are_there_before_anybody_normalises_them(device):
    """After the last layer."""
    states = torch.arange(6.0, device=device).view(2, 3)
    stream = layers.ResidualStream(states.clone())
    stream._added = torch.ones_like(states)
    assert torch.equal(stream.states(), states + 1)
    assert torch.equal(stream.states(), states + 1)
