"""Runs the steps of one model on a GPU: decode steps as CUDA graphs, others kernel by kernel."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.core.plan import SampleTask, ScheduledRow, StepPlan, StepResult
from baton.core.ports import LayersDone
from baton.core.sampling import SampledToken, SamplingParams
from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.registry import attention_backend
from baton.engine.gpu.device_logprobs import Logprobs, add_logprobs, logprobs_on_device
from baton.engine.gpu.device_sampler import sample_again_with_rules, sample_on_device
from baton.engine.gpu.graphs import DecodeGraphs
from baton.engine.gpu.host_copies import HostCopies, all_to_device, to_device
from baton.engine.gpu.token_feed import TokenFeed
from baton.engine.inputs import StepInputs, build_inputs
from baton.engine.layer_groups import layer_group_ends
from baton.engine.models.decoder import Decoder
from baton.engine.pages.kv_cache import KVCache
from baton.engine.pages.memory import kv_cache_bytes_on_gpu, room_for
from baton.engine.prompt_logprobs import asks_for_prompt, prompt_logprobs
from baton.engine.sampler import Task

_CPU = torch.device("cpu")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuStep:
    """Implements `core.ports.SubmittedStep`: what the device has been asked for, and what comes back.

    copies: the tokens of all tasks, int64 `[tasks]`, then the tensors of each of `logprobs`.
    """

    num_rows: int  # of the plan
    rows: tuple[int, ...]  # of the plan, each task's
    tasks: Sequence[Task]
    logprobs: tuple[Logprobs, ...]
    copies: HostCopies
    prompts: Mapping[int, tuple[SampledToken, ...]]  # which the host has waited for

    def collect(self) -> StepResult:
        """See SubmittedStep."""
        token_ids, *others = self.copies.wait()
        tokens = [SampledToken(token_id) for token_id in token_ids.tolist()]
        for index, logprobs in enumerate(self.logprobs):
            add_logprobs(tokens, logprobs, self.tasks, others[4 * index : 4 * index + 4])
        samples: list[list[SampledToken]] = [[] for _ in range(self.num_rows)]
        for row, token in zip(self.rows, tokens, strict=True):
            samples[row].append(token)
        return StepResult(tuple(tuple(row) for row in samples), self.prompts)


class GpuRunner:
    """Implements `core.ports.Runner`; not thread-safe, it belongs to the engine loop's thread.

    All steps go into one stream of the device, where each one begins when the one before it has ended: it
    finds that one's tokens in the feed and its K and V in the pages. The host waits for nothing but the
    tokens of a step that it collects. Layers are told of when they are queued: who reads their pages waits
    for a mark made there and then.
    """

    depth = 2

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        attention: AttentionBackend,
        feed: TokenFeed,
        graphs: DecodeGraphs | None,
    ) -> None:
        """`graphs` read and write the same `feed`."""
        self._decoder = decoder
        self._cache = cache
        self._attention = attention
        self._feed = feed
        self._graphs = graphs

    def idle(self) -> None:
        """See Runner."""

    @torch.inference_mode()
    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> GpuStep:
        """Ask for page copies, one forward pass and the samples. Token ids must be below vocab_size.

        A step that a graph runs tells of no layers: it is launched as a whole.
        """
        try:
            return self._submit(plan, self._after_layer(plan, layers_done))
        except Exception:
            if self._cache.pool.is_cuda:
                torch.cuda.synchronize()  # what was launched before it failed may still write
            raise

    def _submit(self, plan: StepPlan, after_layer: LayersDone | None) -> GpuStep:
        self._cache.copy_blocks(plan.block_copies)
        inputs = build_inputs(plan, self._cache.layout.block_size, self._cache.padding_block, _CPU)
        rows, tasks = _tasks(plan, inputs)
        sources = self._feed.sources(plan, inputs.row_order, inputs.token_ids.shape[0])
        logits = None
        prompts: dict[int, tuple[SampledToken, ...]] = {}
        if self._graphs is not None and not asks_for_prompt(plan):
            logits = self._graphs.run(inputs, sources, [task for _, task in tasks])
        if logits is not None:
            token_ids = self._feed.tokens[: len(tasks)]
            sample_again_with_rules(logits, tasks, token_ids)
            self._feed.remember(rows)
        else:
            hidden = self._hidden(inputs, sources, after_layer)
            prompts = prompt_logprobs(
                plan, inputs.row_order, inputs.attention.row_bounds, hidden, self._decoder.logits
            )
            logits = self._logits(inputs, hidden)
            token_ids = sample_on_device(logits, tasks) if tasks else self._feed.tokens[:0]
            self._take_into_feed(rows, token_ids)
        logprobs = tuple(logprobs_on_device(logits, tasks, token_ids))
        copies = HostCopies([token_ids, *(tensor for each in logprobs for tensor in each.tensors)])
        return GpuStep(len(plan.rows), rows, tasks, logprobs, copies, prompts)

    def _hidden(self, inputs: StepInputs, sources: Tensor, after_layer: LayersDone | None) -> Tensor:
        """The last hidden states of all the step's tokens, `[T, hidden]`, kernel by kernel."""
        inputs, sources = _on_device(inputs, sources, self._cache.pool.device)
        step = self._attention.begin_step(inputs.attention)
        token_ids = self._feed.resolve(inputs.token_ids, sources)
        return self._decoder.forward(token_ids, inputs.positions, step, after_layer)

    def _logits(self, inputs: StepInputs, hidden: Tensor) -> Tensor:
        """`[sampled rows, V]`; of no rows nobody looks at V."""
        if not inputs.sampled_rows:  # as in most chunks of a prompt
            return hidden[:0]
        return self._decoder.logits(hidden[to_device(inputs.sampled_tokens, hidden.device)])

    def _after_layer(self, plan: StepPlan, layers_done: LayersDone | None) -> LayersDone | None:
        """Tells `layers_done` after every group of layers but the last one."""
        if layers_done is None:
            return None
        ends = layer_group_ends(plan, self._cache.layout)

        def after_layer(end_layer: int) -> None:
            if end_layer in ends:
                layers_done(end_layer)

        return after_layer

    def _take_into_feed(self, rows: tuple[int, ...], token_ids: Tensor) -> None:
        """Of all tokens those that are their row's only one: no other is ever followed."""
        num_samples = Counter(rows)
        single = [index for index, row in enumerate(rows) if num_samples[row] == 1]
        if len(single) < len(rows):
            token_ids = token_ids.index_select(
                0, to_device(torch.tensor(single, dtype=torch.int64), token_ids.device)
            )
        self._feed.tokens[: len(single)].copy_(token_ids)
        self._feed.remember([rows[index] for index in single])


def _tasks(plan: StepPlan, inputs: StepInputs) -> tuple[tuple[int, ...], list[Task]]:
    """What is to be sampled, each with its row of the plan, and with its line of the logits."""
    found = [
        (row, (line, task)) for line, row in enumerate(inputs.sampled_rows) for task in plan.rows[row].samples
    ]
    return tuple(row for row, _ in found), [task for _, task in found]


def size_pool(
    decoder: Decoder, layout: KVLayout, max_num_batched_tokens: int, max_num_seqs: int, utilization: float,
    windows: tuple[int | None, ...], device: torch.device,
) -> int:  # fmt: skip
    """Bytes of KV cache that fit beside the weights and the largest step, which is run to see what it takes.

    Raises StartupError, that says which option to change, where they don't fit.
    """
    torch.cuda.empty_cache()  # what only loading and packing took is no part of the peak
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    with room_for("the largest step", device, "lower --max-num-batched-tokens or --max-num-seqs"):
        cache = KVCache(layout, 0, device)
        feed = TokenFeed(max_num_seqs, device)
        runner = GpuRunner(decoder, cache, attention_backend(cache.pool, windows, layout.scales), feed, None)
        runner.submit(largest_step(layout.block_size, max_num_batched_tokens, max_num_seqs)).collect()
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    num_bytes = kv_cache_bytes_on_gpu(total, elsewhere, peak, utilization)
    tokens = num_bytes // layout.bytes_per_block * layout.block_size
    _logger.info("KV cache: %d MiB beside %d MiB, %d tokens", num_bytes >> 20, peak >> 20, tokens)
    return num_bytes


def largest_step(block_size: int, max_num_batched_tokens: int, max_num_seqs: int) -> StepPlan:
    """As many rows and tokens as a step may have, all in page 0 and all drawn with every filter on."""
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    lengths = [1] * (num_rows - 1) + [max_num_batched_tokens - num_rows + 1]
    params = SamplingParams(top_k=50, top_p=0.9, min_p=0.01)
    return StepPlan(
        tuple(
            ScheduledRow(
                [0] * length, 0, [0] * -(-length // block_size), (SampleTask(params, 0, length, [0], []),)
            )
            for length in lengths
        )
    )


def _on_device(inputs: StepInputs, sources: Tensor, device: torch.device) -> tuple[StepInputs, Tensor]:
    attention = inputs.attention
    token_ids, positions, sources, slot_mapping, context_lens, sampled_tokens, block_tables = all_to_device(
        [
            inputs.token_ids, inputs.positions, sources, attention.slot_mapping, attention.context_lens,
            inputs.sampled_tokens, attention.block_tables,
        ],
        device,
    )  # fmt: skip
    attention = replace(
        attention, slot_mapping=slot_mapping, block_tables=block_tables, context_lens=context_lens
    )
    inputs = replace(
        inputs,
        token_ids=token_ids,
        positions=positions,
        attention=attention,
        sampled_tokens=sampled_tokens,
    )
    return inputs, sources
