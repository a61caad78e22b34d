"""Attention backends of a GPU: the choice, and a whole engine with Baton's own kernels."""

import logging
import sys
from itertools import pairwise

import pytest
import torch

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.engine.attention import cuda
from baton.engine.attention.cuda import cuda_attention
from baton.engine.attention.flash_kernels import (
    BackendUnavailable,
    LibraryAttention,
    flash_attention_3,
    torch_varlen,
)
from baton.engine.attention.paged import LayerPages, PagedRows
from baton.engine.attention.triton_kernels import KernelAttention
from baton.engine.cpu.runner import ModelRunner
from baton.engine.factory import load_engine
from tests.engine.driver import Driver, Request, make_prompt
from tests.kernels.gpu.paged import dense_attention


def pool_on(device, dtype=torch.float32):
    return torch.zeros(9, 2, 2, 2, 16, 32, dtype=dtype, device=device)


def dense_library(query, pages: LayerPages, rows: PagedRows, window):
    """What a library's call does, in plain torch, from the very arguments that it would get."""
    outputs, tables = [], rows.block_tables.long()
    bounds, lengths = rows.row_bounds.tolist(), rows.context_lens.tolist()
    assert rows.context_bounds.diff().tolist() == lengths
    assert rows.max_row_len == max(end - first for first, end in pairwise(bounds))
    for row, (first, end) in enumerate(pairwise(bounds)):
        key, value = (
            part[tables[row]].flatten(0, 1)[: lengths[row]].double().cpu()
            for part in (pages.key, pages.value)
        )
        queries = query[first:end].double().cpu()
        start = lengths[row] - (end - first)
        outputs.append(dense_attention(queries, key, value, start, window, None))
    return torch.cat(outputs).to(query)


def test_the_first_that_computes_right_is_taken(device, monkeypatch, caplog):
    def wrong(query, pages, rows, window):
        return dense_library(query, pages, rows, None)

    def missing():
        raise BackendUnavailable("it is not installed")

    def picky():
        def refuse(*_):
            raise RuntimeError("pages must be a multiple of 256\nbacktrace")

        return refuse

    monkeypatch.setattr(
        cuda, "_LIBRARIES",
        (("one", missing), ("two", picky), ("three", lambda: wrong), ("four", lambda: dense_library)),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        chosen = cuda_attention(pool_on(device), (None, None))
    assert isinstance(chosen, LibraryAttention)
    text = caplog.text
    assert "attention: four" in text
    assert (
        "one: it is not installed; two: RuntimeError: pages must be a multiple of 256; three: it is off"
        in text
    )


def test_own_kernels_where_no_library_is(device, monkeypatch, caplog):
    monkeypatch.setattr(cuda, "_LIBRARIES", ())
    with caplog.at_level(logging.INFO):
        assert isinstance(cuda_attention(pool_on(device, torch.bfloat16), (None, 4)), KernelAttention)
    assert "attention: Triton" in caplog.text
    assert "not taken" not in caplog.text


def test_none_says_what_to_do(device, monkeypatch):
    monkeypatch.setattr(cuda, "_LIBRARIES", ())
    monkeypatch.setattr(cuda, "_trial_error", lambda *_: float("nan"))
    with pytest.raises(StartupError, match=r"--block-size.*Triton: it is off by nan"):
        cuda_attention(pool_on(device), (None, None))


def test_what_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(BackendUnavailable, match="flash_attn_interface can't be imported"):
        flash_attention_3()


def test_a_version_without_block_tables_says_so(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value: query)
    with pytest.raises(BackendUnavailable, match="varlen_attn of this version has no block_table, seqused_k"):
        torch_varlen()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "make"), cuda._LIBRARIES)
def test_libraries_on_the_device(device, name, make):
    """Every library that this machine has computes the trial right, with pages that it can take."""
    try:
        attention = make()
    except BackendUnavailable as obstacle:
        pytest.skip(str(obstacle))
    block_size = 256 if name == "flash-attn 2" else 16
    pool = torch.zeros(9, 2, 2, 2, block_size, 128, dtype=torch.bfloat16, device=device)
    error = cuda._trial_error(lambda pages, windows: LibraryAttention(pages, windows, attention), pool)
    assert error < cuda._TRIAL_ERROR


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_engine_gives_the_reference_tokens(checkpoint, device, name):
    """Chunked prefill beside decode, prefix in pages: own kernels give the CPU backend's tokens."""
    if device.type == "cuda":
        pytest.skip("kernels are interpreted only where there is no GPU")
    options = EngineConfig(kv_cache_bytes=4 * 2**20, dtype="float32", device="cpu")
    outputs = []
    for own in (False, True):
        engine = load_engine(checkpoint(name), options)
        if own:
            assert isinstance(engine.runner, ModelRunner)
            backend = KernelAttention(engine.page_store.pool, engine.config.windows)
            object.__setattr__(
                engine, "runner", ModelRunner(engine.runner._decoder, engine.page_store, backend, 512, 64)
            )
        requests = [Request(make_prompt(length)) for length in (5, 37)]
        Driver(engine).generate(requests, 6, chunk=16)
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]
