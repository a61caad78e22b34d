"""Every kernel compiles for a Hopper GPU, at Llama 8B's shapes, on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 227 << 10  # of a Hopper multiprocessor, for one block


def test_kernels_compile_to_the_instructions_they_are_written_for(device, tmp_path):
    if device.type == "cuda":
        pytest.skip("says nothing there that running them does not")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gpu.compiling", "--llama"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    kernels = json.loads(ended.stdout)
    assert {name.partition("#")[0] for name in kernels} == {
        "_rotate_and_store", "_store", "_attend_split", "_combine_splits", "_attend_tile", "_copy_pieces",
        "_sum_words",
        "_rms_norm", "_gated_silu", "_one_row", "_float8_rows", "_sample", "_penalise",
    }  # fmt: skip
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in kernels.values())
    assert kernels["_attend_tile#0"]["wgmma"]
    for name in ("_attend_tile#0", "_attend_split#0", "_attend_split#1"):
        assert kernels[name]["cp_async"]  # pages are fetched while the ones before them are computed
    # 16 bytes of each of four rows of weights at once, and of states, gate's and up's or with their norm's.
    assert [kernels[f"_one_row#{index}"]["vector_loads"] for index in range(3)] == [6, 5, 6]
    # Once more over pages in float8, which are converted before they are multiplied.
    assert kernels["_attend_tile#1"]["wgmma"]
    assert {"_rotate_and_store#1", "_store#1", "_attend_split#3", "_attend_tile#1"} <= set(kernels)
    for name in ("_rotate_and_store#1", "_store#1", "_float8_rows#0", "_float8_rows#1"):
        assert not kernels[name]["inexact_division"]  # would round other numbers to 8 bits than torch does
