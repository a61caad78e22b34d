"""Runs the steps of one model on the CPU, one at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.plan import StepPlan, StepResult
from baton.core.ports import LayersDone
from baton.core.sampling import SampledToken
from baton.engine.attention.base import AttentionBackend
from baton.engine.cpu.recorded_step import StepLogits, recorded_step
from baton.engine.cpu.shared_cores import SharedCores
from baton.engine.inputs import StepArrays, build_arrays, to_tensors
from baton.engine.layer_groups import layer_group_ends
from baton.engine.models.decoder import Decoder
from baton.engine.pages.kv_cache import KVCache
from baton.engine.prompt_logprobs import asks_for_prompt, prompt_logprobs
from baton.engine.sampler import Task, sample, takes_likeliest

# Steps of more tokens look after each layer which cores they may have, others after some.
_LONG_STEP = 64
_SHORT_STEP_LAYERS = 4


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """Implements `core.ports.SubmittedStep`; nothing is computed before `collect`."""

    runner: "ModelRunner"
    plan: StepPlan
    layers_done: LayersDone | None

    def collect(self) -> StepResult:
        """See SubmittedStep."""
        return self.runner.compute(self.plan, self.layers_done)


class ModelRunner:
    """Implements `core.ports.Runner`; not thread-safe, it belongs to the engine loop's thread.

    It computes on the cores that would prepare the next step, so that there is nothing to overlap.
    """

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        attention: AttentionBackend,
        max_num_tokens: int,
        max_num_rows: int,
        cores: SharedCores | None = None,
    ) -> None:
        """`max_num_tokens`, `max_num_rows`: of steps; larger ones take longer than they need.

        `cores`: that it shares with other workers; None: it has its own.
        """
        self._decoder = decoder
        self._cache = cache
        self._attention = attention
        self._recorded = recorded_step(decoder, attention, max_num_tokens, max_num_rows)
        self._cores = cores

    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> PlannedStep:
        """See Runner."""
        return PlannedStep(self, plan, layers_done)

    @torch.inference_mode()
    def compute(self, plan: StepPlan, layers_done: LayersDone | None = None) -> StepResult:
        """Copy pages, compute all rows in one forward pass, sample. Token ids must be below vocab_size.

        `layers_done` hears of groups of layers that are worth a transfer of their own.
        """
        if self._cores is not None:
            self._cores.working()
        self._cache.copy_blocks(plan.block_copies)
        cache = self._cache
        arrays = build_arrays(plan, cache.layout.block_size, cache.padding_block)
        tasks = [
            (line, task) for line, row in enumerate(arrays.sampled_rows) for task in plan.rows[row].samples
        ]
        after_layer = self._after_layer(plan, layers_done)
        prompts: dict[int, tuple[SampledToken, ...]] = {}
        if self._recorded is not None and self._recorded.takes(arrays) and not asks_for_prompt(plan):
            stops = self._stops(plan, layers_done)
            found = self._recorded.run(arrays, stops, after_layer, takes_likeliest(tasks))
        else:
            hidden = self._hidden(arrays, after_layer)
            prompts = prompt_logprobs(
                plan, arrays.row_order, arrays.row_bounds.tolist(), hidden, self._decoder.logits
            )
            # As in most chunks of a prompt: of no rows nobody looks at V.
            sampled = torch.from_numpy(arrays.sampled_tokens)
            found = StepLogits(self._decoder.logits(hidden[sampled]) if tasks else hidden[:0], None)
        tokens = sample(found.logits, tasks, found.likeliest) if tasks else []
        return _result(plan, arrays.sampled_rows, tasks, tokens, prompts)

    def idle(self) -> None:
        """See Runner."""
        if self._cores is not None:
            self._cores.waiting()

    def _after_layer(self, plan: StepPlan, layers_done: LayersDone | None) -> LayersDone:
        """Tells `layers_done` after every group of layers but the last one."""
        cores = self._cores
        ends = set() if layers_done is None else layer_group_ends(plan, self._cache.layout)

        def after_layer(end_layer: int) -> None:
            if cores is not None:
                cores.working()
            if layers_done is not None and end_layer in ends:
                layers_done(end_layer)

        return after_layer

    def _stops(self, plan: StepPlan, layers_done: LayersDone | None) -> set[int]:
        """Layers after which a recorded step calls `after_layer`."""
        ends = set() if layers_done is None else layer_group_ends(plan, self._cache.layout)
        return ends if self._cores is None else ends | self._core_stops(plan)

    def _hidden(self, arrays: StepArrays, after_layer: LayersDone) -> Tensor:
        """The last hidden states of all the step's tokens, `[T, hidden]`, call by call."""
        inputs = to_tensors(arrays, self._cache.pool.device)
        step = self._attention.begin_step(inputs.attention)
        return self._decoder.forward(inputs.token_ids, inputs.positions, step, after_layer)

    def _core_stops(self, plan: StepPlan) -> set[int]:
        """Layers after which to look who else computes: the shorter the step, the fewer."""
        every = 1 if plan.num_tokens > _LONG_STEP else _SHORT_STEP_LAYERS
        return set(range(every, self._cache.layout.num_layers, every))


def _result(
    plan: StepPlan,
    sampled_rows: tuple[int, ...],
    tasks: list[Task],
    tokens: list[SampledToken],
    prompts: dict[int, tuple[SampledToken, ...]],
) -> StepResult:
    samples: list[list[SampledToken]] = [[] for _ in plan.rows]
    for (line, _), token in zip(tasks, tokens, strict=True):
        samples[sampled_rows[line]].append(token)
    return StepResult(tuple(tuple(row) for row in samples), prompts)
