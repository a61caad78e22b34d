"""Chooses the next tokens on the device that has the logits; nothing here waits for it.

The same tokens as `baton.engine.sampler`, but for last bits (`baton_kernels.gpu.sample_tokens`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.plan import SampleTask
from baton.engine.gpu.host_copies import all_to_device, to_device
from baton.engine.logit_rules import (
    allowed_tokens,
    forbids_stopping,
    has_rules,
    known_tokens,
    unpacked,
    with_own_rules,
)
from baton.engine.sampler import Task
from baton_kernels.gpu.penalties import penalise
from baton_kernels.gpu.sample_tokens import SamplingRows, sample_tokens

_LEAST = torch.finfo(torch.float32).min


def sample_on_device(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """One token for each task, in order, int64 `[tasks]`. logits: `[rows, V]`, any float dtype."""
    lines = [line for line, _ in tasks]
    token_ids = sample_tokens(logits, _rows(lines, [task for _, task in tasks], logits.device))
    sample_again_with_rules(logits, tasks, token_ids)
    return token_ids


def sample_again_with_rules(logits: Tensor, tasks: Sequence[Task], token_ids: Tensor) -> None:
    """Where a task's rules change its logits, choose from those, and change `token_ids`, int64 `[tasks]`."""
    ruled = [index for index, (_, task) in enumerate(tasks) if has_rules(task)]
    if not ruled:
        return
    chosen = [tasks[index] for index in ruled]
    changed = _with_rules(logits, chosen)
    rows = _rows(list(range(len(ruled))), [task for _, task in chosen], logits.device)
    token_ids.index_copy_(0, to_device(torch.tensor(ruled), logits.device), sample_tokens(changed, rows))


def sampling_columns(tasks: Sequence[SampleTask]) -> tuple[Tensor, Tensor]:
    """How the tasks' tokens are chosen, in host memory.

    int64 `[3, n]`: top_k, the bits of the seed, position; float64 `[3, n]`: temperature, top_p, min_p.
    """
    params = [task.params for task in tasks]
    integers = [[p.top_k for p in params], [_signed(t.seed) for t in tasks], [t.position for t in tasks]]
    temperatures = [0.0 if p.is_greedy else p.temperature for p in params]
    numbers = [temperatures, [p.top_p for p in params], [p.min_p for p in params]]
    return torch.tensor(integers), torch.tensor(numbers, dtype=torch.float64)


def sampling_rows(lines: Tensor, integers: Tensor, numbers: Tensor) -> SamplingRows:
    """The columns of `sampling_columns` on the device, as the kernel takes them. lines: int64 `[n]`."""
    return SamplingRows(
        lines=lines,
        temperatures=numbers[0].float(),
        top_k=integers[0].int(),
        top_p=numbers[1],
        min_p=numbers[2].float(),
        seeds=integers[1],
        positions=integers[2],
    )


def _rows(lines: list[int], tasks: list[SampleTask], device: torch.device) -> SamplingRows:
    integers, numbers = sampling_columns(tasks)
    columns = all_to_device([torch.tensor(lines), integers, numbers.view(torch.int64)], device)
    return sampling_rows(columns[0], columns[1], columns[2].view(torch.float64))


def _with_rules(logits: Tensor, tasks: list[Task]) -> Tensor:
    """Float32 copies `[tasks, V]` after all rules, as `logit_rules` applies them."""
    device, vocab_size = logits.device, logits.shape[1]
    lines = _to_device([line for line, _ in tasks], torch.int64, device)
    changed = torch.nan_to_num(logits.index_select(0, lines).float(), nan=_LEAST)
    for row, (_, task) in zip(changed, tasks, strict=True):
        if task.rules is not None:
            row.copy_(with_own_rules(row, task))
    allowed = [allowed_tokens(task, vocab_size) for _, task in tasks]
    if any(mask is not None for mask in allowed):
        changed.masked_fill_(~to_device(unpacked(allowed, vocab_size), device), float("-inf"))
    biases = [(i, token, bias) for i, (_, t) in enumerate(tasks) for token, bias in t.params.logit_bias]
    places = _places([(i, token) for i, token, _ in biases], vocab_size, device)
    amounts = [bias for _, token, bias in biases if 0 <= token < vocab_size]
    changed.view(-1).index_add_(0, places, _to_device(amounts, torch.float32, device))
    forbidden = [
        (i, token)
        for i, (_, t) in enumerate(tasks)
        if forbids_stopping(t, allowed[i])
        for token in t.params.stop_token_ids
    ]
    changed.view(-1).index_fill_(0, _places(forbidden, vocab_size, device), float("-inf"))
    if any(task.params.has_penalties for _, task in tasks):
        _penalise(changed, [task for _, task in tasks])
    return changed


def _penalise(logits: Tensor, tasks: list[SampleTask]) -> None:
    params = [task.params for task in tasks]
    columns = _to_device(
        [[p.repetition_penalty for p in params], [p.frequency_penalty for p in params],
         [p.presence_penalty for p in params]], torch.float32, logits.device,
    )  # fmt: skip
    penalise(
        logits,
        _counts(logits, [t.prompt_token_ids if t.params.repetition_penalty != 1.0 else () for t in tasks]),
        _counts(logits, [task.output_token_ids for task in tasks]),
        columns[0], columns[1], columns[2],
    )  # fmt: skip


def _counts(logits: Tensor, token_ids: list[Sequence[int]]) -> Tensor:
    """int32 `[rows, V]`: how often each token is in a row's list."""
    vocab_size = logits.shape[1]
    places = torch.cat(
        [known_tokens(tokens, vocab_size) + row * vocab_size for row, tokens in enumerate(token_ids)]
    )
    places = to_device(places, logits.device)
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
    return counts


def _places(pairs: list[tuple[int, int]], vocab_size: int, device: torch.device) -> Tensor:
    """Indices into a flat `[rows, V]` of (row, token) pairs; tokens outside the vocabulary are left out."""
    known = [row * vocab_size + token for row, token in pairs if 0 <= token < vocab_size]
    return _to_device(known, torch.int64, device)


def _to_device(
    values: list[int] | list[float] | list[list[float]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)


def _signed(seed: int) -> int:
    """The 64 bits of an unsigned seed as torch has them."""
    return seed - 2**64 if seed >= 2**63 else seed
