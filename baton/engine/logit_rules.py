"""What one request's settings do to its logits before a token is drawn."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from baton.core.fields import TokenIds
from baton.core.plan import SampleTask

_FLOAT32 = torch.finfo(torch.float32)
_ALL = b"\xff"


def has_rules(task: SampleTask) -> bool:
    """Whether the task's logits are changed at all."""
    params = task.params
    return (
        bool(params.logit_bias)
        or params.has_penalties
        or _has_mask(task)
        or task.rules is not None
        or task.num_output_tokens < params.min_tokens
    )


def allowed_tokens(task: SampleTask, vocab_size: int) -> bytes | None:
    """The tokens that grammar, `allowed_token_ids` and `bad_words` leave: a bit each, the lowest ids in the
    lowest bits; None: all."""
    if not _has_mask(task):
        return None
    params, num_bytes = task.params, -(-vocab_size // 8)
    mask = _ALL * num_bytes
    if task.matcher is not None:
        mask = task.matcher.allowed(task.output_token_ids)[:num_bytes]
    if params.allowed_token_ids is not None:
        only = _mask_of(params.allowed_token_ids, num_bytes)
        mask = (int.from_bytes(mask, "little") & only).to_bytes(num_bytes, "little")
    left = _without(mask, _ends_of_bad_words(task)) if params.bad_words else mask
    return left if left.count(0) < num_bytes else mask  # a bad word where nothing else may come


def _has_mask(task: SampleTask) -> bool:
    params = task.params
    return task.matcher is not None or params.allowed_token_ids is not None or bool(params.bad_words)


@lru_cache(maxsize=256)
def _mask_of(token_ids: TokenIds, num_bytes: int) -> int:
    return sum(1 << token_id for token_id in set(token_ids) if token_id < 8 * num_bytes)


def _ends_of_bad_words(task: SampleTask) -> Iterator[int]:
    """The tokens that would complete one of them."""
    output = task.output_token_ids
    for *before, last in task.params.bad_words:
        if not before or list(output[-len(before) :]) == before:
            yield last


def _without(mask: bytes, token_ids: Iterable[int]) -> bytes:
    others = bytearray(mask)
    for token_id in token_ids:
        if token_id < 8 * len(others):
            others[token_id // 8] &= ~(1 << token_id % 8)
    return bytes(others)


def with_own_rules(logits: Tensor, task: SampleTask) -> Tensor:
    """One row of logits, finite float32 `[V]`, as the rules of the server's owner change it."""
    if task.rules is None:
        return logits
    changed: Tensor = task.rules.apply(logits, task.prompt_token_ids, task.output_token_ids)
    return changed


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
    """Whether the answer is still to have more tokens; not where nothing but its end is allowed."""
    if task.num_output_tokens >= task.params.min_tokens:
        return False
    if allowed is None:
        return True
    others = _without(allowed, task.params.stop_token_ids)
    return others.count(0) < len(others)


def unpacked(allowed: Sequence[bytes | None], vocab_size: int) -> Tensor:
    """Masks as bool `[n, V]`, in host memory."""
    everything = _ALL * (-(-vocab_size // 8))
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
