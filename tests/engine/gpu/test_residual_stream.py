"""A decoder whose layers add with GPU kernels gives what one without them gives."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from baton.config import EngineConfig
from baton.engine.factory import load_engine
from baton.engine.layers import gate, linear
from baton.engine.layers.gate import Gate
from baton.engine.layers.linear import Linear, ResidualStream
from baton.engine.layers.placement import ParameterPlacement
from baton_kernels.gpu import one_row, row_functions
from tests.engine.driver import Driver, Request, make_prompt


def use_gpu_kernels(monkeypatch):
    for module in (gate, linear):
        monkeypatch.setattr(module, "has_gpu_kernels", lambda states: True)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_sum_is_added_where_it_is_normalised(checkpoint, device, monkeypatch, name):
    """Interpreted on the CPU: the kernels' tokens, of a prompt and of decode steps, are torch's."""
    if device.type == "cuda":
        pytest.skip("kernels are interpreted only where there is no GPU")
    monkeypatch.setattr(linear, "pack", lambda *_: None)
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
                use_gpu_kernels(patch)
            engine = load_engine(checkpoint(name), options)
            num_sums.clear()
            requests = [Request(make_prompt(length)) for length in (5, 12)]
            Driver(engine).generate(requests, 3)
            outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]
    # Each of three layers but the first reads two sums, and the first one reads one of them.
    assert len(num_sums) == 3 * (2 * 3 - 1)


@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen3"])
def test_one_row_goes_through_products_alone(checkpoint, device, monkeypatch, name):
    """As above, of a single sequence's decode steps: nothing else normalises, gates or adds."""
    if device.type == "cuda":
        pytest.skip("kernels are interpreted only where there is no GPU")
    monkeypatch.setattr(linear, "pack", lambda *_: None)
    options = EngineConfig(kv_cache_bytes=1 << 20, dtype="float32", device="cpu")
    engine = load_engine(checkpoint(name), options)
    expected, found = Request(make_prompt(12)), Request(make_prompt(12))
    Driver(engine).generate([expected], 2)
    use_gpu_kernels(monkeypatch)
    driver = Driver(engine)
    driver.generate([found], 1)
    products = []
    product = one_row.one_row

    def counted(states, *arguments):
        products.append(states.shape)
        return product(states, *arguments)

    monkeypatch.setattr(one_row, "one_row", counted)
    for function in ("rms_norm", "add_rms_norm", "gated_silu"):
        monkeypatch.delattr(row_functions, function)
    driver.generate([found], 2)
    assert found.output == expected.output
    assert len(products) == 3 * 4 + 1  # a step of three layers, and the logits


def test_one_row_of_a_gate_that_the_kernel_does_not_know(device, monkeypatch):
    use_gpu_kernels(monkeypatch)
    placement = ParameterPlacement(torch.float32, device)
    down = Linear(8, {"down": 3}, True, placement, reads=Gate("gelu"))
    assert down.weight is not None
    assert down.bias is not None
    for tensor in (down.weight, down.bias):
        tensor.normal_()
    states, residual = torch.randn(1, 16, device=device), torch.randn(1, 3, device=device)
    gated, up = states.chunk(2, -1)
    expected = F.linear(F.gelu(gated) * up, down.weight, down.bias) + residual
    torch.testing.assert_close(down(states, residual), expected)


def test_states_are_there_before_anybody_normalises_them(device):
    """After the last layer."""
    states = torch.arange(6.0, device=device).view(2, 3)
    stream = ResidualStream(states.clone())
    stream._added = torch.ones_like(states)
    assert torch.equal(stream.states(), states + 1)
    assert torch.equal(stream.states(), states + 1)
