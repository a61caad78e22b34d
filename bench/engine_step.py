"""Seconds of an engine's steps without a server: decode, prefill, and growth with the context.

    python -m bench.engine_step [--models small medium] [--dtype bfloat16] [--quantization int8]
                                [--threads 2] [--llama-cpp] [--save]

Random checkpoints; hand-made plans, so that no scheduler runs. "decode" is a step of one greedy token a row
at a context of 256, "prefill" one prompt in one step, "growth" decode of 8 rows at contexts of 256 and 4,096.
"GB/s" is weights and KV that the step reads, "GFLOP/s" its matrix products, each over the median step.
With llama-cpp-python and gguf installed and `--llama-cpp`, the same steps in llama.cpp, in bfloat16.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from baton.config import EngineConfig
from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.sampling import SamplingParams
from baton.engine.factory import Engine, load_engine
from baton_kernels.quantization import INT8_GROUP
from bench.random_model import SHAPES, LlamaShape, random_checkpoint
from bench.report import print_table, save, summary

GREEDY = SamplingParams(temperature=0.0)
BATCHES = (1, 8, 32)
CONTEXT = 256  # of decode steps
PROMPTS = (256, 1024)
GROWTH_BATCH, GROWTH_CONTEXTS = 8, (256, 4096)
BLOCK_SIZE = 16
MAX_CONTEXT = 4608
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class StepBench:
    """Times steps of one loaded engine."""

    def __init__(self, engine: Engine, shape: LlamaShape, weight_bytes: float, num_passes: int) -> None:
        self._engine = engine
        self._shape = shape
        self._bytes = weight_bytes
        self._num_passes = num_passes
        self._random = random.Random(0)

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """A step of one token for each of `batch` requests whose context is that long."""
        per_row = -(-context // BLOCK_SIZE)
        tables = [list(range(row * per_row, (row + 1) * per_row)) for row in range(batch)]
        plan = StepPlan(tuple(self._row(1, context - 1, table) for table in tables))
        return self._timed(f"decode batch {batch} context {context}", plan, batch * context)

    def prefill(self, num_tokens: int) -> dict[str, Any]:
        """One prompt in one step."""
        table = list(range(-(-num_tokens // BLOCK_SIZE)))
        return self._timed(f"prefill {num_tokens}", StepPlan((self._row(num_tokens, 0, table),)), num_tokens)

    def _row(self, num_tokens: int, start: int, table: list[int]) -> ScheduledRow:
        token_ids = [self._random.randrange(self._shape.vocab_size) for _ in range(num_tokens)]
        end = start + num_tokens
        return ScheduledRow(token_ids, start, table, (SampleTask(GREEDY, 0, end, token_ids, []),))

    def _timed(self, name: str, plan: StepPlan, num_kv_tokens: int) -> dict[str, Any]:
        milliseconds = passes_ms(lambda: self._engine.runner.submit(plan).collect(), self._num_passes)
        kv_bytes = num_kv_tokens * self._engine.page_store.layout.bytes_per_block / BLOCK_SIZE
        read_bytes = self._shape.num_step_weights * self._bytes + kv_bytes
        output_weights = self._shape.vocab_size * self._shape.hidden_size
        products = plan.num_tokens * (self._shape.num_step_weights - output_weights)
        products += len(plan.rows) * output_weights
        figures = summary(milliseconds)
        return {
            "step": name,
            **{f"{key} ms": value for key, value in figures.items()},
            "GB/s": round(read_bytes / figures["p50"] / 1e6, 1),
            "GFLOP/s": round(2 * products / figures["p50"] / 1e6, 1),
        }


def passes_ms(work: Callable[[], object], num_passes: int) -> list[float]:
    """Milliseconds of each pass after two that warm up."""
    times = []
    for _ in range(num_passes + 2):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return times[2:]


def measure(
    name: str, dtype: str, quantization: str, num_threads: int, num_passes: int
) -> list[dict[str, Any]]:
    """Rows of one model."""
    shape = SHAPES[name]
    weight_bytes = 1 + 2 / INT8_GROUP if quantization == "int8" else DTYPE_BYTES[dtype]
    with random_checkpoint(shape, dtype, max_position_embeddings=8192) as directory:
        options = EngineConfig(
            kv_cache_bytes=2 << 30, num_threads=num_threads, max_model_len=MAX_CONTEXT, block_size=BLOCK_SIZE,
            quantization=quantization,
        )  # fmt: skip
        bench = StepBench(load_engine(directory, options), shape, weight_bytes, num_passes)
        rows = [bench.decode(batch, CONTEXT) for batch in BATCHES]
        rows += [bench.prefill(num_tokens) for num_tokens in PROMPTS]
        rows += [bench.decode(GROWTH_BATCH, context) for context in GROWTH_CONTEXTS]
    return rows


def measure_llama_cpp(name: str, num_threads: int, num_passes: int) -> list[dict[str, Any]]:
    """The same steps in llama.cpp; raises ImportError where its packages are missing."""
    from bench.llama_cpp_step import measure

    def milliseconds(work: Callable[[], object]) -> dict[str, Any]:
        return {f"{key} ms": value for key, value in summary(passes_ms(work, num_passes)).items()}

    return measure(SHAPES[name], BATCHES, PROMPTS, CONTEXT, num_threads, milliseconds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--passes", type=int, default=15, help="of which the median is taken")
    parser.add_argument(
        "--llama-cpp", action="store_true", help="also time llama.cpp (needs llama-cpp-python and gguf)"
    )
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/")
    return parser.parse_args(arguments)


def main() -> None:
    """See the module."""
    arguments = parse()
    rows = []
    for name in arguments.models:
        dtype, quantization, threads = arguments.dtype, arguments.quantization, arguments.threads
        measured = measure(name, dtype, quantization, threads, arguments.passes)
        print_table(f"{name}, {dtype}, weights {quantization}, {threads} threads", measured)
        model = {"model": name, "dtype": dtype, "quantization": quantization, "threads": threads}
        rows += [model | row for row in measured]
        if arguments.llama_cpp:
            peer = measure_llama_cpp(name, arguments.threads, arguments.passes)
            print_table(f"{name}, llama.cpp", peer)
            rows += [model | {"engine": "llama.cpp"} | row for row in peer]
    if arguments.save:
        print(save("engine-step", rows))


if __name__ == "__main__":
    main()
