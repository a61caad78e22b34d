"""The part `float8` of `bench.gpu_check`: a model's random weights in bfloat16, then the same in float8.

They are those of `--quantization fp8`; a checkpoint's own bits are multiplied by the same calls.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch

from baton.engine.models.decoder import Decoder, DecoderConfig
from bench.gpu_figures import Figure
from bench.gpu_model import BLOCK_SIZE, random_decoder, runner_for, step_of
from bench.gpu_parity import PROMPT
from bench.quantized_logits import logits_of

CONTEXT = 1024
NUM_PREFILLS = 5
# Larger weights make attention sharper, and rounding shows more. With these it leaves a cosine of 0.995 on a
# CPU, and of 0.95 to 0.99 where one of the eight products takes its outputs' scales in another order.
STD = 0.05
LEAST_COSINE = 0.99


class Timer(Protocol):
    """Runs some work several times."""

    def __call__(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Seconds that it takes once."""
        ...


def cosine_of_logits(config: DecoderConfig, device: torch.device) -> Figure:
    """Of a small model; the mean over a prompt's tokens."""
    decoder = random_decoder(config, device, std=STD, quantization="fp8")
    exact = logits_of(decoder, device, PROMPT)
    decoder.pack()
    cosines = torch.cosine_similarity(exact, logits_of(decoder, device, PROMPT), dim=-1)
    return Figure("small model: cosine of logits", float(cosines.mean()), "", at_least=LEAST_COSINE)


def steps(config: DecoderConfig, device: torch.device, num_tokens: int, timer: Timer) -> Iterator[Figure]:
    """A decode step at batch 1 and a prefill of `num_tokens`; float8 that is slower would be of no use."""
    decoder = random_decoder(config, device, quantization="fp8")
    plain = _seconds(decoder, device, num_tokens, timer)
    decoder.pack()
    float8 = _seconds(decoder, device, num_tokens, timer)
    for name, before in plain.items():
        yield Figure(f"{name}, bfloat16", before * 1e3, "ms")
        yield Figure(f"{name}, float8", float8[name] * 1e3, "ms")
        yield Figure(f"{name}, bfloat16 over float8", before / float8[name], "x", at_least=1.0)


def _seconds(decoder: Decoder, device: torch.device, num_tokens: int, timer: Timer) -> dict[str, float]:
    """Of each kind of step; decode steps are CUDA graphs where there are any."""
    num_blocks = max(num_tokens, CONTEXT) // BLOCK_SIZE + 1
    graph_sizes = (1,) if device.type == "cuda" else ()
    graphs = runner_for(decoder, device, num_blocks=num_blocks, batch_sizes=graph_sizes)
    eager = runner_for(decoder, device, cache=graphs.cache, batch_sizes=())
    return {
        f"decode step, batch 1, context {CONTEXT}": timer(partial(graphs.run, step_of(1, 1, CONTEXT - 1))),
        f"prefill of {num_tokens} tokens": timer(partial(eager.run, step_of(1, num_tokens, 0)), NUM_PREFILLS),
    }
