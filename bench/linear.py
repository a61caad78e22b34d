"""Milliseconds of single linear layers: bfloat16 weights, 8-bit weights, and oneDNN's 8-bit weights.

    python -m bench.linear [--models medium] [--rows 1 8 32 256] [--threads 2] [--save]

The layers of one decoder layer and the output projection, their weights random and colder than any cache:
each is there in several copies that take turns. oneDNN gets states that are rounded with one scale for all
rows, which is all that its operator in torch takes; its time includes that rounding.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from baton_kernels.cpu.library import cpu_kernels
from baton_kernels.cpu.linear import PackedInt8Linear, PackedLinear
from bench.random_model import SHAPES, LlamaShape
from bench.report import print_table, save

Multiply = Callable[[Tensor], object]
COLD_BYTES = 128 << 20  # copies of a matrix together, in bfloat16


def layer_sizes(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices that a step multiplies."""
    head_dim = shape.hidden_size // shape.num_heads
    return {
        "qkv": ((shape.num_heads + 2 * shape.num_kv_heads) * head_dim, shape.hidden_size),
        "attention output": (shape.hidden_size, shape.num_heads * head_dim),
        "gate and up": (2 * shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
        "logits": (shape.vocab_size, shape.hidden_size),
    }


def onednn_int8(weight: Tensor, num_rows: int) -> Multiply:
    """oneDNN's product with 8-bit weights, a scale for each output and one for all states."""
    scales = weight.abs().amax(dim=1).float() / 127
    rounded = (weight.float() / scales[:, None]).round_().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, [num_rows, weight.shape[1]])
    zeros = torch.zeros(len(scales), dtype=torch.int64)

    def multiply(states: Tensor) -> Tensor:
        scale = states.abs().amax().float() / 127
        rounded_states = (states / scale + 128).round_().to(torch.uint8)
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded_states, float(scale), 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16,
            "none", [], "",
        )  # fmt: skip
        return output

    return multiply


def kinds(weight: Tensor, num_rows: int) -> dict[str, Callable[[], Multiply]]:
    """What makes a copy of the matrix for each of the ways to multiply it."""
    library = cpu_kernels()
    if library is None:
        raise SystemExit("there are no C kernels here to be timed")
    return {
        "bfloat16 ms": lambda: PackedLinear(library, weight),
        "int8 ms": lambda: PackedInt8Linear(library, weight),
        "oneDNN int8 ms": lambda: onednn_int8(weight, num_rows),
    }


def measure(shape: LlamaShape, num_rows: int, num_passes: int) -> Iterator[dict[str, Any]]:
    """One line a matrix; the kinds take turns, so that what disturbs one disturbs all."""
    generator = torch.Generator().manual_seed(0)
    for name, (outputs, inputs) in layer_sizes(shape).items():
        weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
        states = torch.randn(num_rows, inputs, generator=generator).bfloat16()
        copies = max(1, COLD_BYTES // (2 * weight.numel()))
        makers = kinds(weight, num_rows)
        made = {kind: itertools.cycle([make() for _ in range(copies)]) for kind, make in makers.items()}
        times: dict[str, list[float]] = {kind: [] for kind in made}
        for _ in range(num_passes + 2):
            for kind, cycle in made.items():
                multiply = next(cycle)
                started = time.perf_counter()
                multiply(states)
                times[kind].append((time.perf_counter() - started) * 1e3)
        medians = {kind: round(statistics.median(passes[2:]), 3) for kind, passes in times.items()}
        yield {"matrix": f"{name} {outputs} x {inputs}", "rows": num_rows, **medians}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["medium"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--passes", type=int, default=15, help="of which the median is taken")
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for model, num_rows in itertools.product(arguments.models, arguments.rows):
        measured = list(measure(SHAPES[model], num_rows, arguments.passes))
        print_table(f"{model}, {num_rows} rows, {arguments.threads} threads", measured)
        results += [{"model": model, "threads": arguments.threads} | row for row in measured]
    if arguments.save:
        print(save("linear", results))


if __name__ == "__main__":
    main()
