"""How likely the model holds the tokens of prompts, in rows that ask for it; after the pass over them."""

from collections.abc import Callable, Sequence

from torch import Tensor

from baton.core.plan import StepPlan
from baton.core.sampling import SampledToken
from baton.engine.sampler import Wanted, logprobs_of

_ROWS_AT_A_TIME = 64  # bounds the memory: their logits are rows times vocabulary


def asks_for_prompt(plan: StepPlan) -> bool:
    """Whether some row of the step does."""
    return any(row.prompt is not None for row in plan.rows)


def prompt_logprobs(
    plan: StepPlan,
    row_order: Sequence[int],
    row_bounds: Sequence[int],
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
) -> dict[int, tuple[SampledToken, ...]]:
    """Of each row of the plan that asks: its prompt's tokens after the row's own, one for one.

    hidden: `[T, hidden]`, the step's last hidden states; row `row_order[i]` has the tokens from
    `row_bounds[i]` to `row_bounds[i + 1]`. logits_of: of such states.
    """
    found = {}
    for place, index in enumerate(row_order):
        asked = plan.rows[index].prompt
        if asked is not None:
            states = hidden[row_bounds[place] : row_bounds[place] + len(asked.next_token_ids)]
            found[index] = _of_row(states, asked.next_token_ids, asked.num_logprobs, logits_of)
    return found


def _of_row(
    states: Tensor, token_ids: Sequence[int], count: int, logits_of: Callable[[Tensor], Tensor]
) -> tuple[SampledToken, ...]:
    tokens: list[SampledToken] = []
    for first in range(0, len(token_ids), _ROWS_AT_A_TIME):
        part = token_ids[first : first + _ROWS_AT_A_TIME]
        logits = logits_of(states[first : first + len(part)])
        tokens += logprobs_of(logits, [Wanted(line, token_id, count) for line, token_id in enumerate(part)])
    return tuple(tokens)
