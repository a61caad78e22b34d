"""Chooses the next tokens of all rows of a step.

The order is vLLM's: rules (bias, min_tokens, penalties), temperature, min_p, top_k, top_p, draw.
A task's token depends on its own logits, settings, seed and position, never on the rest of the batch.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.plan import SampleTask
from baton.core.sampling import SampledToken, SamplingParams, uniform
from baton.engine.logit_rules import allowed_tokens, apply_rules, has_rules, unpacked, with_own_rules
from baton_kernels.cpu.allowed_rows import allowed_rows
from baton_kernels.cpu.argmax import argmax
from baton_kernels.cpu.library import DTYPES, cpu_kernels
from baton_kernels.cpu.logprobs import Chosen, logprobs
from baton_kernels.cpu.sample_tokens import Drawn, sample_tokens

_TASKS_AT_A_TIME = 32  # bounds the sampler's memory: about 32 bytes * vocabulary each
_LIKELIEST_LOOKED_AT = 1024  # top_p sorts more than these only where they don't reach it
_SMALLEST = torch.finfo(torch.float32).tiny  # a temperature below it would be 0 in float32

Task = tuple[int, SampleTask]  # the line of its logits


def takes_likeliest(tasks: Sequence[Task]) -> bool:
    """Whether some task takes the likeliest token of the logits as they are."""
    return any(task.params.is_greedy and not has_rules(task) for _, task in tasks)


def sample(
    logits: Tensor, tasks: Sequence[Task], likeliest: Sequence[int] | None = None
) -> list[SampledToken]:
    """One token for each task, in order. logits: `[rows, V]`, any float dtype, left unchanged.

    NaN counts as the least likely. `likeliest`: each row's token where somebody has looked already; else rows
    that are plainly greedy cost one argmax.
    """
    token_ids = [0] * len(tasks)
    ruled = [index for index, (_, task) in enumerate(tasks) if has_rules(task)]
    plain = sorted(set(range(len(tasks))) - set(ruled))
    for index, token_id in zip(
        plain, _choose(logits, [tasks[index] for index in plain], likeliest), strict=True
    ):
        token_ids[index] = token_id
    for group in _groups(ruled):
        allowed = [allowed_tokens(tasks[index][1], logits.shape[1]) for index in group]
        lines = [tasks[index][0] for index in group]
        if any(tasks[index][1].rules is not None for index in group):
            own = zip(_finite(logits, lines), group, strict=True)
            changed = torch.stack([with_own_rules(row, tasks[index][1]) for row, index in own])
            changed = _allowed(changed, list(range(len(group))), allowed)
        else:
            changed = _allowed(logits, lines, allowed)
        chosen = [(line, tasks[index][1]) for line, index in enumerate(group)]
        for line, task in chosen:
            apply_rules(changed[line], task, allowed[line])
        for index, token_id in zip(group, _choose(changed, chosen), strict=True):
            token_ids[index] = token_id
    return with_logprobs(logits, tasks, token_ids)


def _choose(logits: Tensor, tasks: Sequence[Task], likeliest: Sequence[int] | None = None) -> list[int]:
    """The tasks' tokens, of the logits as they are."""
    token_ids = [0] * len(tasks)
    if any(task.params.is_greedy for _, task in tasks):
        if likeliest is None:
            likeliest = _likeliest(logits).tolist()
        token_ids = [likeliest[line] for line, _ in tasks]
    drawn = [index for index, (_, task) in enumerate(tasks) if not task.params.is_greedy]
    for index, token_id in zip(drawn, _draw_all(logits, [tasks[index] for index in drawn]), strict=True):
        token_ids[index] = token_id
    return token_ids


def _likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the lowest id of equals, int64 `[rows]`."""
    if (library := _library_for(logits)) is not None:
        return argmax(library, logits)
    token_ids = logits.argmax(dim=-1)
    # argmax takes NaN for the greatest, so its own value tells whether a row has any.
    broken = logits.gather(-1, token_ids[:, None]).isnan().squeeze(-1)
    if broken.any():
        lines = broken.nonzero().squeeze(-1)
        token_ids[lines] = _finite(logits, lines.tolist()).argmax(dim=-1)
    return token_ids


def _allowed(logits: Tensor, lines: list[int], allowed: Sequence[bytes | None]) -> Tensor:
    """Those lines as finite float32 copies, in which what is not allowed has the least numbers."""
    if (library := _library_for(logits)) is not None:
        return allowed_rows(library, logits, lines, allowed)
    rows = _finite(logits, lines)
    if any(mask is not None for mask in allowed):
        rows.masked_fill_(~unpacked(allowed, logits.shape[1]).to(rows.device), float("-inf"))
    return rows


def _finite(logits: Tensor, lines: list[int]) -> Tensor:
    """Those lines as float32 copies, without NaN or infinities."""
    least = torch.finfo(torch.float32).min
    return logits[lines].float().nan_to_num_(nan=least)


def _draw_all(logits: Tensor, tasks: Sequence[Task]) -> list[int]:
    """Token ids of tasks that are not greedy."""
    if not tasks:
        return []
    numbers = [uniform(task.seed, task.position) for _, task in tasks]
    if (library := _library_for(logits)) is not None:
        rows = [
            _as_drawn(line, task.params, number) for (line, task), number in zip(tasks, numbers, strict=True)
        ]
        drawn: list[int] = sample_tokens(library, logits, rows).tolist()
        return drawn
    token_ids: list[int] = []
    for group in _groups(list(range(len(tasks)))):
        lines = [tasks[index][0] for index in group]
        params = [tasks[index][1].params for index in group]
        probabilities = filtered_probabilities(_finite(logits, lines), params)
        token_ids += draw(probabilities, [numbers[index] for index in group]).tolist()
    return token_ids


def _as_drawn(line: int, params: SamplingParams, number: float) -> Drawn:
    temperature = max(params.temperature, _SMALLEST)
    return Drawn(line, temperature, params.top_k, params.top_p, params.min_p, number)


def _library_for(logits: Tensor) -> ctypes.CDLL | None:
    """The C kernels, if they take these logits."""
    return cpu_kernels() if logits.device.type == "cpu" and logits.dtype in DTYPES else None


def filtered_probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities after temperature and filters, not normalised: 0 for tokens that can't be drawn.

    logits: float32 `[rows, V]`; all temperatures above 0. Returns float32 `[rows, V]`.
    """
    vocab_size = logits.shape[-1]
    temperatures = _column([max(p.temperature, _SMALLEST) for p in params], logits)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures  # the likeliest has 0
    if any(p.min_p > 0.0 for p in params):
        scaled.masked_fill_(scaled < _column([p.min_p for p in params], logits).log(), float("-inf"))
    lines = [line for line, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if lines:
        counts = torch.tensor([params[line].top_k for line in lines], device=logits.device)
        scaled[lines] = _top_k(scaled[lines], counts)
    probabilities = torch.softmax(scaled, dim=-1)
    lines = [line for line, p in enumerate(params) if p.top_p < 1.0]
    if lines:
        masses = _column([params[line].top_p for line in lines], logits, torch.float64)
        probabilities[lines] = _top_p(probabilities[lines], masses)
    return probabilities


def draw(probabilities: Tensor, numbers: Sequence[float]) -> Tensor:
    """Inverse of the cumulative distribution in token id order: int64 `[rows]`.

    probabilities: `[rows, V]`, not normalised; numbers: one in [0, 1) a row. A token of
    probability 0 is never drawn, nor one outside the vocabulary, whatever the probabilities.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Rounding may carry the product up to the total, beyond the last token that has a probability.
    target = torch.minimum(
        _column(numbers, probabilities, torch.float64) * total, total.nextafter(torch.zeros_like(total))
    )
    token_ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return token_ids.clamp_max_(probabilities.shape[-1] - 1)


def _top_k(scaled: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts` `[rows]` greatest of each row; the rest becomes minus infinity."""
    greatest = scaled.topk(int(counts.max()), dim=-1).values
    smallest_kept = greatest.gather(-1, counts[:, None] - 1)
    return scaled.masked_fill(~_greatest(scaled, smallest_kept, counts[:, None]), float("-inf"))


def _top_p(probabilities: Tensor, masses: Tensor) -> Tensor:
    """Nucleus sampling (Holtzman et al., 2019): keep the fewest tokens that reach `masses` `[rows, 1]`."""
    vocab_size = probabilities.shape[-1]
    descending = probabilities.topk(min(_LIKELIEST_LOOKED_AT, vocab_size), dim=-1).values
    cumulative = descending.cumsum(dim=-1, dtype=torch.float64)
    if vocab_size > _LIKELIEST_LOOKED_AT and bool((cumulative[:, -1:] < masses).any()):
        descending = probabilities.sort(dim=-1, descending=True).values
        cumulative = descending.cumsum(dim=-1, dtype=torch.float64)
    counts = ((cumulative < masses).sum(dim=-1, keepdim=True) + 1).clamp_(max=descending.shape[-1])
    smallest_kept = descending.gather(-1, counts - 1)
    return probabilities.masked_fill(~_greatest(probabilities, smallest_kept, counts), 0.0)


def _greatest(values: Tensor, smallest_kept: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts` greatest of each row, the lowest ids of equals; the least is `smallest_kept`."""
    above = values > smallest_kept
    equal = values == smallest_kept
    return above | (equal & (equal.cumsum(dim=-1) <= counts - above.sum(dim=-1, keepdim=True)))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Log probabilities of a token, of so many of the likeliest in its place, and of others by id."""

    line: int  # of the logits
    token_id: int
    count: int
    others: Sequence[int] = ()


def with_logprobs(logits: Tensor, tasks: Sequence[Task], token_ids: list[int]) -> list[SampledToken]:
    """The chosen tokens of the tasks, with the log probabilities that they ask for."""
    tokens = [SampledToken(token_id) for token_id in token_ids]
    asked = [index for index, (_, task) in enumerate(tasks) if task.params.num_logprobs is not None]
    wanted = []
    for index in asked:
        line, params = tasks[index][0], tasks[index][1].params
        wanted.append(Wanted(line, token_ids[index], params.num_logprobs or 0, params.logprob_token_ids))
    for index, token in zip(asked, logprobs_of(logits, wanted), strict=True):
        tokens[index] = token
    return tokens


def logprobs_of(logits: Tensor, wanted: Sequence[Wanted]) -> list[SampledToken]:
    """Each token with what is wanted of it. logits: `[rows, V]`, any float dtype, left unchanged."""
    if wanted and (library := _library_for(logits)) is not None:
        rows = []
        for each in wanted:
            rows.append(Chosen(each.line, each.token_id, each.count))
            rows += (Chosen(each.line, token_id, 0) for token_id in each.others)
        found = iter(logprobs(library, logits, rows))
        tokens = []
        for each in wanted:
            logprob, top = next(found)
            others = [(token_id, next(found)[0]) for token_id in each.others]
            tokens.append(SampledToken(each.token_id, logprob, with_others(top, others)))
        return tokens
    tokens = []
    for group in _groups(list(range(len(wanted)))):
        lines = torch.log_softmax(_finite(logits, [wanted[index].line for index in group]), dim=-1)
        for index, line in zip(group, lines, strict=True):
            each = wanted[index]
            others = [(token_id, float(line[token_id])) for token_id in each.others]
            top = with_others(_top_logprobs(line, each.count), others)
            tokens.append(SampledToken(each.token_id, float(line[each.token_id]), top))
    return tokens


def with_others(
    top: Sequence[tuple[int, float]], others: Sequence[tuple[int, float]]
) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens, then those of the others that are not among them, the likeliest first."""
    known = {token_id for token_id, _ in top}
    rest = {token_id: logprob for token_id, logprob in others if token_id not in known}
    return (*top, *sorted(rest.items(), key=lambda entry: (-entry[1], entry[0])))


def _top_logprobs(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens of one row, the lowest ids of equals first."""
    count = min(count, logprobs.shape[0])
    if count == 0:
        return ()
    token_ids = (logprobs >= logprobs.topk(count).values[-1]).nonzero().squeeze(-1)
    values, order = logprobs[token_ids].sort(descending=True, stable=True)
    return tuple(zip(token_ids[order[:count]].tolist(), values[:count].tolist(), strict=True))


def _column(numbers: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=like.device)[:, None]


def _groups(indices: list[int]) -> Iterator[list[int]]:
    for first in range(0, len(indices), _TASKS_AT_A_TIME):
        yield indices[first : first + _TASKS_AT_A_TIME]
