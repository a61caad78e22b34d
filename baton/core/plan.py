"""What the scheduler hands to the runner for one step, and what comes back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.core.grammar import TokenMatcher
from baton.core.logits_rules import RequestRules
from baton.core.sampling import SampledToken, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleTask:
    """One token to sample from the last hidden state of a row.

    The sequences are the request's own lists: read them while the step is submitted, never keep or change
    them. A row that `follows` another has an output that lacks that one's token.
    """

    params: SamplingParams
    seed: int  # of this choice, unsigned 64 bits
    position: int  # index that the sampled token will have in prompt + output
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    matcher: TokenMatcher | None = None  # says which tokens may be sampled; None: all
    rules: RequestRules | None = None  # change its logits

    @property
    def num_output_tokens(self) -> int:
        """Tokens of output before the one to sample, known or not."""
        return self.position - len(self.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class PromptTask:
    """The log probabilities of prompt tokens, and of the `num_logprobs` likeliest in the place of each.

    `next_token_ids[i]` follows the row's token i; the prompt's last token has none.
    """

    next_token_ids: Sequence[int]
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """The tokens of one request that this step computes.

    `block_table[i]` is the page of positions [i * block_size, (i + 1) * block_size); it covers at least
    positions [0, start + len(token_ids)), of which [0, start) are computed already. `block_table` is the
    request's own list: read it while the step is submitted only.

    A row that `follows` has one token, which the step planned just before this one samples: as the one sample
    of its row of that index. Nobody on the host knows it yet, and `token_ids` is (0,).
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    samples: tuple[SampleTask, ...] = ()  # empty while the row does not reach the request's last token
    follows: int | None = None
    prompt: PromptTask | None = None  # None: nobody asks for it


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copy these pages first, in order, then compute these rows.

    At least one row. Rows are in no particular order of kind; one token each is decode, more is prefill.
    """

    rows: tuple[ScheduledRow, ...]
    block_copies: tuple[tuple[int, int], ...] = ()  # (source block, destination block)
    num_leaving_blocks: int = 0  # that the step completes and whose layers may leave as they are computed

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """`samples[r]` are the tokens of `plan.rows[r].samples`, in their order; `prompts[r]` those of
    `plan.rows[r].prompt`, where there is one."""

    samples: tuple[tuple[SampledToken, ...], ...]
    prompts: Mapping[int, tuple[SampledToken, ...]] = field(default_factory=dict)
