"""What multiplies the weights, and what does where that is missing."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from baton.core.errors import StartupError
from baton.engine.layers.linear import Linear, OutputProjection
from baton.engine.layers.norm import RMSNorm
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.quantization import packing
from baton_kernels.cpu.library import cpu_kernels
from baton_kernels.cpu.linear import PackedLinear
from tests.checkpoints import reference_greedy
from tests.engine.driver import Driver, Request, make_prompt

CPU = torch.device("cpu")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "cpu_kernels", lambda: None)


@pytest.fixture
def no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_has_onednn", lambda: False)


def make_projection(dtype: torch.dtype) -> tuple[OutputProjection, torch.Tensor, RMSNorm]:
    torch.manual_seed(0)
    placement = ParameterPlacement(dtype, CPU)
    norm = RMSNorm("norm", 48, 1e-6, placement)
    norm.weight.normal_()
    projection = OutputProjection(48, {"embed": 100}, False, placement, reads=norm)
    [(_, weight)] = projection.checkpoint_tensors()
    weight.normal_()
    return projection, weight.clone(), norm


def check_projection(dtype: torch.dtype, tolerance: float) -> OutputProjection:
    projection, weight, norm = make_projection(dtype)
    projection.pack()
    states = torch.randn(5, 48).to(dtype)
    normalised = F.rms_norm(states.double(), (48,), norm.weight.double(), 1e-6)
    expected = F.linear(normalised, weight.double())
    assert torch.allclose(projection(states).double(), expected, atol=tolerance * float(expected.abs().max()))
    assert torch.equal(projection.embed(torch.tensor([99, 0, 31, 32])), weight[[99, 0, 31, 32]])
    return projection


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_kernels_need_no_plain_copy(dtype, tolerance):
    if cpu_kernels() is None:
        pytest.skip("no C kernels here")
    projection = check_projection(dtype, tolerance)
    assert isinstance(projection._packed, PackedLinear)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_onednn(dtype, tolerance):
    projection = check_projection(dtype, tolerance)
    assert isinstance(projection._packed, packing.OneDnnLinear)


@pytest.mark.usefixtures("no_kernels", "no_onednn")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_plain_torch(dtype, tolerance):
    assert check_projection(dtype, tolerance)._packed is None


@pytest.mark.usefixtures("no_kernels")
def test_8_bit_weights_need_the_kernels():
    linear = Linear(32, {"a": 40}, False, ParameterPlacement(torch.bfloat16, CPU, "int8"))
    with pytest.raises(StartupError, match=r"--quantization int8 needs .* install a C compiler"):
        linear.pack()


def test_a_cpu_that_adds_no_products_is_told_once_what_8_bits_cost(monkeypatch, caplog):
    monkeypatch.setattr(packing, "adds_products_of_pairs", lambda: False)
    packing._warn_where_slow.cache_clear()
    try:
        for _ in range(2):
            packing._warn_where_slow()
    finally:
        packing._warn_where_slow.cache_clear()
    [warning] = caplog.records
    assert "more time" in warning.getMessage()


@pytest.mark.usefixtures("no_kernels")
def test_model_on_onednn(engine, reference):
    request = Request(make_prompt(37))
    Driver(engine("qwen2")).generate([request], 24)
    assert request.output == reference_greedy(reference("qwen2"), request.prompt, 24)
