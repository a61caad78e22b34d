"""Chooses the next tokens on the device that has the logits; one copy to the host, of token ids.

The same tokens as `baton.engine.sampler`, but for last bits (`kernels.gpu.sample_tokens`). Log probabilities,
where asked for, are taken as there, with copies of their own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.plan import SampleTask
from baton.core.sampling import SampledToken
from baton.engine.logit_rules import has_rules
from baton.engine.sampler import Task, with_logprobs
from kernels.gpu.penalties import penalise
from kernels.gpu.sample_tokens import SamplingRows, sample_tokens

_LEAST = torch.finfo(torch.float32).min


def sample_on_device(logits: Tensor, tasks: Sequence[Task]) -> list[SampledToken]:
    """One token for each task, in order. logits: `[rows, V]`, any float dtype, left unchanged."""
    lines = [line for line, _ in tasks]
    ruled = [index for index, (_, task) in enumerate(tasks) if has_rules(task)]
    if ruled:
        changed = _with_rules(logits, [tasks[index] for index in ruled])
        source = torch.cat((logits.float(), changed))
        for place, index in enumerate(ruled):
            lines[index] = logits.shape[0] + place
    else:
        source = logits
    token_ids = sample_tokens(source, _rows(lines, [task for _, task in tasks], logits.device))
    chosen: list[int] = token_ids.tolist()  # the step's one wait for the device
    return with_logprobs(logits, tasks, chosen)


def _rows(lines: list[int], tasks: list[SampleTask], device: torch.device) -> SamplingRows:
    """All columns in one copy to the device, as float64 and int64."""
    params = [task.params for task in tasks]
    integers = _to_device(
        [lines, [p.top_k for p in params], [_signed(task.seed) for task in tasks],
         [task.position for task in tasks]], torch.int64, device,
    )  # fmt: skip
    numbers = _to_device(
        [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]],
        torch.float64, device,
    )  # fmt: skip
    return SamplingRows(
        lines=integers[0],
        temperatures=numbers[0].float(),
        top_k=integers[1].int(),
        top_p=numbers[1],
        min_p=numbers[2].float(),
        seeds=integers[2],
        positions=integers[3],
    )


def _with_rules(logits: Tensor, tasks: list[Task]) -> Tensor:
    """Float32 copies `[tasks, V]` after bias, `min_tokens` and penalties, as `logit_rules` applies them."""
    device, vocab_size = logits.device, logits.shape[1]
    lines = _to_device([line for line, _ in tasks], torch.int64, device)
    changed = torch.nan_to_num(logits.index_select(0, lines).float(), nan=_LEAST)
    biases = [(i, token, bias) for i, (_, t) in enumerate(tasks) for token, bias in t.params.logit_bias]
    places = _places([(i, token) for i, token, _ in biases], vocab_size, device)
    amounts = [bias for _, token, bias in biases if 0 <= token < vocab_size]
    changed.view(-1).index_add_(0, places, _to_device(amounts, torch.float32, device))
    forbidden = [
        (i, token)
        for i, (_, t) in enumerate(tasks)
        if len(t.output_token_ids) < t.params.min_tokens
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
        _counts(logits, [task.prompt_token_ids for task in tasks]),
        _counts(logits, [task.output_token_ids for task in tasks]),
        columns[0], columns[1], columns[2],
    )  # fmt: skip


def _counts(logits: Tensor, token_ids: list[Sequence[int]]) -> Tensor:
    """int32 `[rows, V]`: how often each token is in a row's list."""
    pairs = [(row, token) for row, tokens in enumerate(token_ids) for token in tokens]
    places = _places(pairs, logits.shape[1], logits.device)
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
    return counts


def _places(pairs: list[tuple[int, int]], vocab_size: int, device: torch.device) -> Tensor:
    """Indices into a flat `[rows, V]` of (row, token) pairs; tokens outside the vocabulary are left out."""
    known = [row * vocab_size + token for row, token in pairs if 0 <= token < vocab_size]
    return _to_device(known, torch.int64, device)


def _to_device(values: list[int] | list[float] | list[list[int]] | list[list[float]], dtype: torch.dtype,
               device: torch.device) -> Tensor:  # fmt: skip
    """Through pinned memory, so that nothing waits."""
    tensor = torch.tensor(values, dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _signed(seed: int) -> int:
    """The 64 bits of an unsigned seed as torch has them."""
    return seed - 2**64 if seed >= 2**63 else seed
