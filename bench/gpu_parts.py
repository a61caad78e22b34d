"""The parts of `bench.gpu_check`, each a process: `python -m bench.gpu_parts NAME DIR`.

Bars are shares of what the same run measured of the device: its copy bandwidth (bytes read and written) and
its rate at a large bfloat16 matrix product, both in `DIR/limits.jsonl`.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from baton.core.plan import StepPlan
from baton.core.ports import Runner
from baton.engine.models.decoder import Decoder
from bench.gpu_figures import Figure
from bench.gpu_model import LLAMA_8B, random_decoder, runner_for, step_of

CUDA = torch.device("cuda")
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Of this device, as measured in this run."""

    bytes_per_s: float
    flops_per_s: float


def read_limits(out: Path) -> Limits:
    """What the part `limits` wrote; NaN, which no figure keeps to, if it has not."""
    path = out / "limits.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    values = {figure["name"]: figure["value"] for figure in map(json.loads, lines)}
    return Limits(
        values.get("copy bandwidth", math.nan) * 1e9, values.get("bf16 matrix product", math.nan) * 1e12
    )


def device_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of the device's time, after three runs that are not counted."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # cycles, in which the host queues all of it
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1000)
    return statistics.median(times)


def wall_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of the host's time until the device is done, after three runs that are not counted."""
    times = []
    for index in range(repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def steady_seconds(runner: Runner, plan: StepPlan, repeats: int = 20) -> float:
    """Median of a step's time, the next one submitted before it is collected, as the engine's loop does."""
    under_way, last, times = runner.submit(plan), 0.0, []
    for index in range(repeats + 3):
        following = runner.submit(plan)
        under_way.collect()
        under_way, now = following, time.perf_counter()
        if index >= 3:
            times.append(now - last)
        last = now
    under_way.collect()
    return statistics.median(times)


def limits(_: Path) -> Iterator[Figure]:
    """The device's own ceilings, on random data."""
    source = torch.randint(0, 2**62, (2 * GIB // 8,), device=CUDA)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    seconds = device_seconds(copy)
    yield Figure("copy bandwidth", 2 * source.nbytes / seconds / 1e9, "GB/s")
    del source, target, copy
    left, right = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    seconds = device_seconds(lambda: left @ right)
    yield Figure("bf16 matrix product", 2 * 8192**3 / seconds / 1e12, "TFLOP/s")


def attention(out: Path) -> Iterator[Figure]:
    """Paged decode attention alone: bytes of K and V read, over time."""
    from baton_kernels.gpu.paged_decode import attend_one_token_rows, splits_for

    bandwidth = read_limits(out).bytes_per_s
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    for rows, context in ((16, 32768), (1, 1024), (64, 2048), (1, 32768)):
        num_blocks = rows * context // 16
        pool = torch.randn(num_blocks, 1, 2, 8, 16, 128, device=CUDA, dtype=torch.bfloat16)
        tables = torch.randperm(num_blocks, device=CUDA).int().view(rows, -1)
        lengths = torch.full((rows,), context, dtype=torch.int32, device=CUDA)
        query = torch.randn(rows, 32, 128, device=CUDA, dtype=torch.bfloat16)
        chosen = splits_for(rows, 8, processors)
        for num_splits in sorted({chosen, max(1, chosen // 2), min(64, chosen * 2)}):
            work = partial(
                attend_one_token_rows, query, pool[:, 0, 0], pool[:, 0, 1], tables, lengths,
                num_splits=num_splits,
            )  # fmt: skip
            rate = pool.nbytes / device_seconds(work) / 1e9
            has_bar = (rows, num_splits) == (16, chosen)
            name = f"decode attention, batch {rows}, context {context}, {num_splits} splits"
            name += " (chosen)" if num_splits == chosen else ""
            yield Figure(name, rate, "GB/s", at_least=0.75 * bandwidth / 1e9 if has_bar else None)


def model(out: Path) -> Iterator[Figure]:
    """Decode steps and a prefill of Llama 8B's shape, random weights; sampling and host work count."""
    measured = read_limits(out)
    decoder = random_decoder(LLAMA_8B, CUDA)
    weights = sum(tensor.nbytes for tensor in decoder.checkpoint_tensors().values())
    embedding = decoder.checkpoint_tensors()["model.embed_tokens.weight"].nbytes
    graphs = runner_for(decoder, CUDA, num_blocks=64 * 2064 // 16 + 64, batch_sizes=(1, 64))
    eager = runner_for(decoder, CUDA, cache=graphs.cache, batch_sizes=())
    for rows, context, share in ((1, 1024, 1.25), (64, 2048, 1.4)):
        plan = step_of(rows, 1, context - 1)
        # The embedding is looked up, not read.
        num_bytes = weights - embedding + rows * context * graphs.cache.layout.bytes_per_block / 16
        floor = num_bytes / measured.bytes_per_s
        name = f"decode step, batch {rows}, context {context}"
        steady = steady_seconds(graphs.runner, plan)
        yield Figure(f"{name}, as the engine runs them", steady * 1e3, "ms", at_most=share * floor * 1e3)
        seconds = wall_seconds(partial(graphs.run, plan))
        yield Figure(f"{name}, alone", seconds * 1e3, "ms")
        slow = wall_seconds(partial(eager.run, plan), repeats=10)
        yield Figure(f"{name}, alone, eager", slow * 1e3, "ms")
        yield Figure(f"{name}, eager over graph", slow / seconds, "x", at_least=2.0 if rows == 1 else None)
    yield from engine_loops(decoder)
    tokens = 8192
    seconds = wall_seconds(lambda: eager.run(step_of(1, tokens, 0)), repeats=5)
    matrices = (weights - 2 * embedding) * tokens  # two operations for the two bytes of a weight
    attended = 4 * (tokens**2 / 2) * LLAMA_8B.num_heads * LLAMA_8B.head_dim * LLAMA_8B.num_layers
    rate = (matrices + attended) / seconds
    yield Figure("prefill of 8192 tokens", seconds * 1e3, "ms")
    share = 0.6 * measured.flops_per_s / 1e12
    yield Figure("prefill of 8192 tokens, rate", rate / 1e12, "TFLOP/s", at_least=share)


def engine_loops(decoder: Decoder) -> Iterator[Figure]:
    """Tokens per second of an engine's loop at batch 32, with the next step prepared ahead and without."""
    from bench import gpu_parity

    rows, tokens = 32, 64
    num_blocks = rows * -(-(len(gpu_parity.PROMPT) + 1 + tokens) // 16)
    runner = runner_for(decoder, CUDA, num_blocks=num_blocks, batch_sizes=(rows,)).runner
    gpu_parity.tokens_per_s(runner, num_blocks, rows, 8)  # warms up
    for name, each in (("one step at a time", gpu_parity.OneStepAtATime(runner)), ("a step ahead", runner)):
        rates = [gpu_parity.tokens_per_s(each, num_blocks, rows, tokens) for _ in range(3)]
        yield Figure(f"engine loop, batch {rows}, {name}", statistics.median(rates), "tokens/s")


def parity(_: Path) -> Iterator[Figure]:
    """Tokens of small models in bfloat16: the CPU's in float32; with graphs, the eager ones bit for bit."""
    from baton.core.kv_layout import KVLayout
    from baton.engine.attention.registry import attention_backend
    from baton.engine.cpu.runner import ModelRunner
    from baton.engine.pages.kv_cache import KVCache
    from bench import gpu_parity

    cpu, num_blocks = torch.device("cpu"), 16
    for name, config in gpu_parity.MODELS.items():
        decoder = random_decoder(config, CUDA, std=0.1)
        layout = KVLayout(16, config.num_layers, config.num_kv_heads, config.head_dim, "float32")
        cache = KVCache(layout, num_blocks, cpu)
        attention = attention_backend(cache.pool, config.windows)
        reference = gpu_parity.fed(
            ModelRunner(gpu_parity.in_float32(decoder), cache, attention, 512, 64), None
        )
        tokens = [token.token_id for token in reference]
        decoder.pack()
        sampled = []
        for batch_sizes in ((1,), ()):
            runner = runner_for(decoder, CUDA, num_blocks=num_blocks, batch_sizes=batch_sizes).runner
            sampled.append(gpu_parity.fed(runner, tokens))
        found = gpu_parity.agreement(sampled[0], reference)
        yield Figure(f"{name}: equal tokens of {gpu_parity.NUM_STEPS}", found.num_equal, "", at_least=60)
        yield Figure(f"{name}: log probabilities off by", found.worst, "", at_most=gpu_parity.TOLERANCE)
        equal = sum(one == other for one, other in zip(*sampled, strict=True))
        yield Figure(f"{name}: graph equal to eager, bit for bit", equal, "steps", at_least=64)


def other_kernels(_: Path) -> Iterator[Figure]:
    """Matrix products of one row, kernels around them, and copies for transfers."""
    from baton_kernels.gpu import page_copies, row_functions
    from baton_kernels.gpu.sample_tokens import SamplingRows, sample_tokens
    from bench import gpu_one_row

    yield from gpu_one_row.products(CUDA, device_seconds)
    for rows in (1, 64):
        logits = torch.randn(rows, 128_256, device=CUDA, dtype=torch.bfloat16) * 3
        lines = torch.arange(rows, device=CUDA)
        for name, top_k, top_p in (("no filter", 0, 1.0), ("top_k 50", 50, 1.0), ("top_p 0.9", 0, 0.9)):
            chosen = SamplingRows(
                lines, torch.ones(rows, device=CUDA), torch.full((rows,), top_k, device=CUDA).int(),
                torch.full((rows,), top_p, device=CUDA).double(), torch.zeros(rows, device=CUDA),
                lines, lines,
            )  # fmt: skip
            seconds = device_seconds(partial(sample_tokens, logits, chosen))
            yield Figure(f"sampling, batch {rows}, {name}", seconds * 1e6, "us")
    states = torch.randn(8192, 4096, device=CUDA, dtype=torch.bfloat16)
    residual = torch.zeros_like(states)
    seconds = device_seconds(lambda: row_functions.add_rms_norm(states, residual, states[0], 1e-5))
    yield Figure("RMSNorm + residual, 8192 tokens", 4 * states.nbytes / seconds / 1e9, "GB/s")
    pool = torch.randn(512, 32, 2, 8, 16, 128, device=CUDA, dtype=torch.bfloat16)
    blocks = torch.randperm(512, device=CUDA)[:256]
    staging = page_copies.gather_blocks(pool, blocks, 0, 32)
    seconds = device_seconds(lambda: page_copies.gather_blocks(pool, blocks, 0, 32, staging))
    yield Figure("gather of 256 pages", 2 * staging.nbytes / seconds / 1e9, "GB/s")
    pinned = torch.empty(staging.shape, dtype=staging.dtype, pin_memory=True)
    seconds = device_seconds(lambda: pinned.copy_(staging, non_blocking=True))
    yield Figure("staging to pinned memory", staging.nbytes / seconds / 1e9, "GB/s")


def transformers(_: Path) -> Iterator[Figure]:
    """Tokens per second at batch 32 against transformers' generate: same shape, card and number of tokens."""
    from transformers import LlamaForCausalLM

    from bench.gpu_model import hugging_face_config

    rows, prompt, tokens = 32, 128, 64
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(CUDA):
        theirs = LlamaForCausalLM(hugging_face_config(LLAMA_8B)).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, LLAMA_8B.vocab_size, (rows, prompt), device=CUDA)
    rates = {}
    for length in (8, tokens):  # the first warms up
        torch.cuda.synchronize()
        started = time.perf_counter()
        theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
            min_new_tokens=length, pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        rates["transformers"] = rows * length / (time.perf_counter() - started)
    yield Figure("transformers generate, batch 32", rates["transformers"], "tokens/s")
    del theirs
    torch.cuda.empty_cache()
    decoder = random_decoder(LLAMA_8B, CUDA)
    runner = runner_for(decoder, CUDA, num_blocks=rows * 16, batch_sizes=(rows,))
    runner.run(step_of(rows, prompt, 0))
    started = time.perf_counter()
    runner.run(step_of(rows, prompt, 0))
    for index in range(tokens - 1):
        runner.run(step_of(rows, 1, prompt + index))
    torch.cuda.synchronize()
    ours = rows * tokens / (time.perf_counter() - started)
    yield Figure("Baton, batch 32", ours, "tokens/s", at_least=5 * rates["transformers"])


def transfers(_: Path) -> Iterator[Figure]:
    """See bench.gpu_transfers, which needs all that Baton's servers do."""
    from bench.gpu_transfers import transfers as measured

    yield from measured()


def float8(_: Path) -> Iterator[Figure]:
    """See bench.gpu_float8."""
    from bench import gpu_float8, gpu_parity

    yield gpu_float8.cosine_of_logits(gpu_parity.SMALL, CUDA)
    yield from gpu_float8.steps(LLAMA_8B, CUDA, 8192, wall_seconds)


PARTS = {
    "limits": limits,
    "parity": parity,
    "attention": attention,
    "model": model,
    "other-kernels": other_kernels,
    "transformers": transformers,
    "transfers": transfers,
    "float8": float8,
}


def write_figures(figures: Iterator[Figure], path: Path) -> None:
    """Each as soon as it is measured."""
    with path.open("w") as file:
        for figure in figures:
            print(figure, flush=True)
            file.write(json.dumps(figure.as_json()) + "\n")
            file.flush()


if __name__ == "__main__":
    _, chosen_part, folder = sys.argv
    with torch.inference_mode():
        write_figures(PARTS[chosen_part](Path(folder)), Path(folder) / f"{chosen_part}.jsonl")
