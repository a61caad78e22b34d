"""What one request's settings do to its logits before a token is drawn."""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.core.plan import SampleTask

_FLOAT32 = torch.finfo(torch.float32)


def has_rules(task: SampleTask) -> bool:
    """Whether the task's logits are changed at all."""
    params = task.params
    return (
        bool(params.logit_bias)
        or params.has_penalties
        or task.matcher is not None
        or task.num_output_tokens < params.min_tokens
    )


def allowed_tokens(task: SampleTask) -> bytes | None:
    """The tokens that the task's grammar allows, a bit each, the lowest ids in the lowest bits; None: all."""
    return None if task.matcher is None else task.matcher.allowed(task.output_token_ids)


def apply_rules(logits: Tensor, task: SampleTask, allowed: bytes | None) -> None:
    """Change one row of logits, float32 `[V]`, in place: bias, then `min_tokens`, then penalties.

    What the grammar does not allow has the least numbers already. Tokens outside the vocabulary are passed
    over.
    """
    params = task.params
    if params.logit_bias:
        _add_bias(logits, params.logit_bias)
    if forbids_stopping(task, allowed):
        logits[_known(params.stop_token_ids, logits)] = float("-inf")
    if params.has_penalties:
        _penalise(logits, task)


def forbids_stopping(task: SampleTask, allowed: bytes | None) -> bool:
    """Whether the answer is still to have more tokens; not where its grammar allows nothing but its end."""
    if task.num_output_tokens >= task.params.min_tokens:
        return False
    if allowed is None:
        return True
    others = bytearray(allowed)
    for token_id in task.params.stop_token_ids:
        if token_id < 8 * len(others):
            others[token_id // 8] &= ~(1 << token_id % 8)
    return others.count(0) < len(others)


def unpacked(allowed: Sequence[bytes | None], vocab_size: int) -> Tensor:
    """Masks as bool `[n, V]`, in host memory."""
    everything = b"\xff" * (-(-vocab_size // 8))
    rows = [(everything if mask is None else mask)[: len(everything)] for mask in allowed]
    packed = np.stack([np.frombuffer(row, dtype=np.uint8) for row in rows])
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")).bool()


def _add_bias(logits: Tensor, biases: Sequence[tuple[int, float]]) -> None:
    ids = torch.tensor([token_id for token_id, _ in biases], device=logits.device)
    values = torch.tensor([bias for _, bias in biases], device=logits.device, dtype=logits.dtype)
    known = (ids >= 0) & (ids < logits.shape[0])
    logits.index_put_((ids[known],), values[known], accumulate=True)


def _penalise(logits: Tensor, task: SampleTask) -> None:
    """Repetition (Keskar et al., 2019) over prompt and output; frequency and presence over the output."""
    params = task.params
    output_ids = _known(task.output_token_ids, logits)
    if params.repetition_penalty != 1.0:
        seen = torch.cat((_known(task.prompt_token_ids, logits), output_ids))
        values = logits[seen]
        penalty = max(params.repetition_penalty, _FLOAT32.tiny)  # one below it would be 0 in float32
        values = torch.where(values > 0, values / penalty, values * penalty).clamp_max_(_FLOAT32.max)
        logits[seen] = values  # a token that was seen twice has the same value twice
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        token_ids, counts = output_ids.unique(return_counts=True)
        logits[token_ids] -= params.frequency_penalty * counts + params.presence_penalty


def _known(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    """The ids that are in the vocabulary, int64."""
    return known_tokens(token_ids, logits.shape[0]).to(logits.device)


def known_tokens(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """The ids that are in the vocabulary, int64, in host memory; nothing is converted of an `array("q")`."""
    if not token_ids:
        return torch.empty(0, dtype=torch.int64)
    packed = token_ids if isinstance(token_ids, array) else array("q", token_ids)
    ids = torch.frombuffer(packed, dtype=torch.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]
