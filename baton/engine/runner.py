"""Runs one step of one model on one device."""

import torch

from baton.core.plan import SampleTask, StepPlan, StepResult
from baton.core.sampling import SampledToken
from baton.engine.attention.base import AttentionBackend
from baton.engine.inputs import build_inputs
from baton.engine.kv_cache import KVCache
from baton.engine.models.decoder import Decoder
from baton.engine.sampler import sample


class ModelRunner:
    """Implements `core.ports.Runner`; not thread-safe, it belongs to the engine loop's thread."""

    def __init__(self, decoder: Decoder, cache: KVCache, attention: AttentionBackend) -> None:
        self._decoder = decoder
        self._cache = cache
        self._attention = attention

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Copy pages, compute all rows in one forward pass, sample. Token ids must be below vocab_size."""
        self._cache.copy_blocks(plan.block_copies)
        cache = self._cache
        inputs = build_inputs(plan, cache.layout.block_size, cache.padding_block, cache.pool.device)
        step = self._attention.begin_step(inputs.attention)
        hidden = self._decoder.forward(inputs.token_ids, inputs.positions, step)
        if not inputs.sampled_rows:
            return StepResult(samples=((),) * len(plan.rows))
        logits = self._decoder.logits(hidden[inputs.sampled_tokens])
        tasks = [
            (line, task) for line, row in enumerate(inputs.sampled_rows) for task in plan.rows[row].samples
        ]
        tokens = sample(logits, tasks)
        return _result(plan, inputs.sampled_rows, tasks, tokens)


def _result(
    plan: StepPlan,
    sampled_rows: tuple[int, ...],
    tasks: list[tuple[int, SampleTask]],
    tokens: list[SampledToken],
) -> StepResult:
    samples: list[list[SampledToken]] = [[] for _ in plan.rows]
    for (line, _), token in zip(tasks, tokens, strict=True):
        samples[sampled_rows[line]].append(token)
    return StepResult(samples=tuple(tuple(row) for row in samples))
