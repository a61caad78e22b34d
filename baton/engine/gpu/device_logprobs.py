"""Log probabilities of sampled tokens, computed on the device and copied with the tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.core.sampling import SampledToken
from baton.engine.gpu.host_copies import all_to_device
from baton.engine.sampler import Task, with_others

_ROWS_AT_A_TIME = 32  # bounds the memory: about 24 bytes * vocabulary each
_LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of some tasks of a step.

    tasks: their indices. chosen: float32 `[n]`, of the sampled tokens. values, token_ids: float32 and int64
    `[n, k]`, the likeliest tokens, the lowest id of equals first; k is the most that any of them asks for.
    others: float32 `[n, m]`, of the tokens that each asks for by id; m is the most of those.
    """

    tasks: tuple[int, ...]
    chosen: Tensor
    values: Tensor
    token_ids: Tensor
    others: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What lies on the device."""
        return self.chosen, self.values, self.token_ids, self.others


def logprobs_on_device(logits: Tensor, tasks: Sequence[Task], token_ids: Tensor) -> Iterator[Logprobs]:
    """For all tasks that ask for them. logits: `[rows, V]`; token_ids: int64 `[tasks]`, as sampled."""
    asked = [index for index, (_, task) in enumerate(tasks) if task.params.num_logprobs is not None]
    for first in range(0, len(asked), _ROWS_AT_A_TIME):
        yield _logprobs(logits, tasks, token_ids, tuple(asked[first : first + _ROWS_AT_A_TIME]))


def _logprobs(logits: Tensor, tasks: Sequence[Task], token_ids: Tensor, indices: tuple[int, ...]) -> Logprobs:
    asked = [tasks[index][1].params.logprob_token_ids for index in indices]
    most = max(map(len, asked))
    padded = [[*token_ids, *[0] * (most - len(token_ids))] for token_ids in asked]
    places, lines, others = all_to_device(
        [
            torch.tensor(indices),
            torch.tensor([tasks[index][0] for index in indices]),
            torch.tensor(padded, dtype=torch.int64).view(len(indices), most),
        ],
        logits.device,
    )
    finite = torch.nan_to_num(logits.index_select(0, lines).float(), nan=_LEAST)
    logprobs = torch.log_softmax(finite, dim=-1)
    count = max(tasks[index][1].params.num_logprobs or 0 for index in indices)
    chosen = logprobs.gather(1, token_ids.index_select(0, places)[:, None]).squeeze(1)
    # A stable sort, since nothing else says which of equals comes first, and ties are common in bfloat16.
    values, order = logprobs.sort(dim=-1, descending=True, stable=True)
    return Logprobs(indices, chosen, values[:, :count], order[:, :count], logprobs.gather(1, others))


def add_logprobs(
    tokens: list[SampledToken], logprobs: Logprobs, tasks: Sequence[Task], copies: Sequence[Tensor]
) -> None:
    """Put them into `tokens`, of all tasks. `copies`: `logprobs.tensors` on the host."""
    chosen, values, token_ids, others = (copy.tolist() for copy in copies)
    for place, index in enumerate(logprobs.tasks):
        params = tasks[index][1].params
        count = params.num_logprobs or 0
        top = list(zip(token_ids[place][:count], values[place][:count], strict=True))
        more = list(zip(params.logprob_token_ids, others[place], strict=False))
        tokens[index] = SampledToken(tokens[index].token_id, chosen[place], with_others(top, more))
