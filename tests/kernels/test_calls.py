"""Kernels that are recorded do what they do when they are called, for any number of rows and threads."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from baton.engine.layers.rope import RopeConfig, RotaryEmbedding
from baton_kernels.cpu.angles import Angles
from baton_kernels.cpu.argmax import argmax
from baton_kernels.cpu.calls import ChosenRows, NotRecordable, recorded
from baton_kernels.cpu.embedding import EmbeddingTable
from baton_kernels.cpu.library import cpu_kernels
from baton_kernels.cpu.linear import PackedInt8Linear, PackedLinear
from baton_kernels.reads import Normalise

NUM_ROWS, WIDTH = 70, 96


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    kernels = cpu_kernels()
    if kernels is None:
        pytest.skip("no C kernels here")
    return kernels


@pytest.fixture(params=[1, 2, 5])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def chain(library: ctypes.CDLL, dtype: torch.dtype) -> list[PackedLinear | PackedInt8Linear]:
    torch.manual_seed(0)
    norm = Normalise(torch.randn(WIDTH), 1e-5)
    made: list[PackedLinear | PackedInt8Linear] = []
    for kind, is_gated in ((PackedLinear, False), (PackedInt8Linear, False), (PackedLinear, True)):
        weight = torch.randn(WIDTH * (1 + is_gated), WIDTH).to(dtype) * WIDTH**-0.5
        made.append(kind(library, weight, None, norm, is_gated))
    return 3 * made


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recording_computes_what_calls_do(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    layers = chain(library, dtype)
    rows = torch.randn(NUM_ROWS, WIDTH).to(dtype)
    ids, count = torch.zeros(8, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    recorded_rows = torch.zeros_like(rows)
    with recorded(library) as recording:
        states = recorded_rows
        for layer in layers:
            states = layer(states, residual=states)
        scores = layers[0](states, chosen=ChosenRows(ids, count))
        likeliest = argmax(library, scores, ChosenRows(ids, count))
    for num_rows, chosen in ((NUM_ROWS, [3, 69, 0]), (1, [0]), (33, [32, 7]), (NUM_ROWS, [5])):
        recorded_rows[:num_rows] = rows[-num_rows:]
        ids[: len(chosen)], count[0] = torch.tensor(chosen), len(chosen)
        recording.run(0, len(recording), num_rows)
        expected = rows[-num_rows:]
        for layer in layers:
            expected = layer(expected, residual=expected)
        assert torch.equal(states[:num_rows], expected)
        assert torch.equal(scores[: len(chosen)], layers[0](expected[chosen]))
        assert torch.equal(likeliest[: len(chosen)], scores[: len(chosen)].float().argmax(dim=1))


def test_a_recording_uses_memory_again(library: ctypes.CDLL) -> None:
    states, layers = torch.zeros(NUM_ROWS, WIDTH), chain(library, torch.float32)
    addresses = set()
    with recorded(library) as recording:
        for layer in layers:
            states = layer(states)
            addresses.add(states.data_ptr())
    assert len(recording) == 9
    assert len(addresses) == 2  # what is read and what is written


def test_what_is_no_kernel_is_not_recorded(library: ctypes.CDLL) -> None:
    [layer, *_] = chain(library, torch.float32)
    states = torch.ones(NUM_ROWS, WIDTH)
    with pytest.raises(NotRecordable, match=r"aten\.relu.* is no C kernel"), recorded(library):
        layer(states.view(NUM_ROWS, 4, -1).flatten(1)).relu()
    assert layer(states).isfinite().all()  # computed at once, again


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 37).to(dtype)
    ids = torch.tensor([49, 0, 31, 32, 31])
    table = EmbeddingTable(library, weight, 37, dtype, is_packed=False)
    assert torch.equal(table(ids), weight[ids])
    assert torch.equal(PackedLinear(library, weight).table()(ids), weight[ids])


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)
def test_angles(library: ctypes.CDLL, dtype: torch.dtype, tolerance: float) -> None:
    """As torch has them, but for a last bit."""
    rope = RopeConfig("default", 10_000.0, 1.0, 2048.0)
    embedding = RotaryEmbedding(rope, 64, dtype, torch.device("cpu"))
    positions = torch.tensor([0, 1, 2, 1000, 131_071])
    expected = embedding.angles(positions)
    kernel = Angles(library, embedding._frequencies, embedding._scale, dtype)
    for ours, theirs in zip(kernel(positions), expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours.double(), theirs.double(), rtol=0.0, atol=tolerance)
