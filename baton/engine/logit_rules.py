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
        bool(params.logit_bias) or params.has_penalties or task.matcher is not None or _forbids_stopping(task)
    )


def apply_rules(logits: Tensor, task: SampleTask) -> None:
    """Change one row of logits, float32 `[V]`, in place: bias, then `min_tokens`, then penalties.

    Tokens outside the vocabulary are passed over.
    """
    params = task.params
    if params.logit_bias:
        _add_bias(logits, params.logit_bias)
    if _forbids_stopping(task):
        logits[_known(params.stop_token_ids, logits)] = float("-inf")
    if params.has_penalties:
        _penalise(logits, task)


def keep_allowed(logits: Tensor, tasks: Sequence[SampleTask]) -> None:
    """Let no token be drawn that a row's grammar does not allow, in place, after all rules: `[tasks, V]`.

    Where `min_tokens` has forbidden all that a grammar allows, which are end tokens then, the grammar wins.
    """
    rows = [row for row, task in enumerate(tasks) if task.matcher is not None]
    if not rows:
        return
    allowed = torch.stack([_allowed(tasks[row], logits.shape[1]) for row in rows]).to(logits.device)
    lines = torch.tensor(rows, device=logits.device)
    chosen = logits.index_select(0, lines).masked_fill_(~allowed, float("-inf"))
    nothing_left = chosen.amax(dim=-1, keepdim=True) == float("-inf")
    chosen.masked_fill_(nothing_left & allowed, 0.0)
    logits.index_copy_(0, lines, chosen)


def _allowed(task: SampleTask, vocab_size: int) -> Tensor:
    """Which tokens may come next by the task's grammar, bool `[V]` in host memory."""
    assert task.matcher is not None
    bits = np.frombuffer(task.matcher.allowed(task.output_token_ids), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little")).bool()


def _forbids_stopping(task: SampleTask) -> bool:
    return task.num_output_tokens < task.params.min_tokens


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
