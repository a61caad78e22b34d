"""One request as an engine sees it, and what is said about it to and from the engine."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from baton.core.grammar import Grammar, TokenMatcher
from baton.core.logits_rules import RequestRules
from baton.core.sampling import SampledToken, SamplingParams, choice_seed
from baton.core.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is asked to do: the same on prefill and decode.

    Where it goes on with what an earlier attempt has begun, `answered_token_ids` are its output so far: their
    K and V are computed, or arrive, with the prompt's, and whatever counts output counts them. Such a request
    has one choice.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    hash_seed: bytes  # parent of the first block's hash; see prefix.py
    block_hashes: tuple[bytes, ...]  # of the full blocks of prompt and answered tokens
    sampling: SamplingParams
    priority: int = 0  # lower first; equal ones in order of arrival
    answered_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = field(default=None, compare=False, repr=False)  # made of sampling.grammar
    rules: RequestRules | None = field(default=None, compare=False, repr=False)  # of sampling.logits_rules
    # The prompt as samplers get it: memory that they read as it is, where they read it at every step.
    prompt_for_sampler: Sequence[int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        is_read = self.sampling.repetition_penalty != 1.0
        prompt = array("q", self.prompt_token_ids) if is_read else self.prompt_token_ids
        object.__setattr__(self, "prompt_for_sampler", prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens that are known from the start: prompt and answered."""
        return len(self.prompt_token_ids) + len(self.answered_token_ids)


class Phase(Enum):
    """Where a sequence is in its engine."""

    WAITING = "waiting"  # holds no pages
    RUNNING = "running"  # part of the batch
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class SequenceState:
    """One choice of a request: its tokens, pages and progress. Changed by the scheduler alone."""

    request: EngineRequest
    choice: int
    arrival: int  # order of arrival at this engine
    # A prefill server's requests end after their first token; their pages, from this block on, are exported
    # for a transfer. None for a request that stays.
    export_from: int | None = None
    hands_over: bool = False
    dropped_choices: set[int] = field(default_factory=set)  # before their first token
    output_token_ids: list[int] = field(init=False)  # begins with those that were answered
    num_computed_tokens: int = 0  # tokens whose K and V are in the pages
    num_steps_under_way: int = 0  # that have a row of it
    num_tokens_under_way: int = 0  # tokens whose K and V they compute, after the computed ones
    num_awaited_tokens: int = 0  # that they sample: its next tokens, not known yet
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(init=False)  # of its full blocks; output's are added as they fill
    num_published_blocks: int = 0
    num_exported_blocks: int = field(init=False)  # blocks before it have left, or need not leave
    num_exported_layers: int = 0  # of the pages that the prompt's last step completes
    num_cached_prompt_tokens: int = 0  # found in the prefix cache when it first started
    phase: Phase = Phase.WAITING
    has_begun: bool = False  # it was part of the batch, or its prompt was; if it waits, it has lost its pages
    seed: int = field(init=False)
    matcher: TokenMatcher | None = field(init=False)  # of the request's grammar

    def __post_init__(self) -> None:
        self.seed = choice_seed(self.request.sampling.seed, self.choice)
        self.output_token_ids = list(self.request.answered_token_ids)
        grammar = self.request.grammar
        self.matcher = None if grammar is None else grammar.matcher()
        self.block_hashes = list(self.request.block_hashes)
        self.num_exported_blocks = self.export_from or 0

    @property
    def failure(self) -> str | None:
        """Why it can't go on; None while it can."""
        of_rules = None if self.request.rules is None else self.request.rules.failure
        return of_rules if self.matcher is None else self.matcher.failure or of_rules

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_planned_tokens(self) -> int:
        """Tokens whose K and V are in the pages when the steps under way have ended."""
        return self.num_computed_tokens + self.num_tokens_under_way

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: priority, then arrival."""
        return (self.request.priority, self.arrival, self.choice)

    def tokens(self, start: int, end: int) -> tuple[int, ...] | list[int]:
        """Token ids of positions [start, end)."""
        num_prompt = self.num_prompt_tokens
        if end <= num_prompt:
            return self.request.prompt_token_ids[start:end]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return [*self.request.prompt_token_ids[start:], *self.output_token_ids[: end - num_prompt]]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token. `position` is its index among the choice's output tokens."""

    request_id: str
    choice: int
    position: int
    token: SampledToken
    finish_reason: FinishReason | None = None
    num_cached_prompt_tokens: int = 0  # set with the first token of choice 0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """How likely the model holds some tokens of a prompt, one after the other from `first_position` on.

    All of a prompt's come before its first sampled token; a prompt that is computed again tells them again.
    """

    request_id: str
    first_position: int
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class PagesReady:
    """Some layers of pages of a handed-over request, that nobody will write again; the pages are held for the
    transfer until `Scheduler.release_pages` gives them back. `first_block` is an index into the request's
    block table; `blocks` may be empty."""

    request_id: str
    first_block: int
    blocks: tuple[int, ...]
    first_layer: int
    end_layer: int | None  # None: after the model's last
    is_last: bool  # the prompt is computed; its first tokens come with the same step's events


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """Pages taken for a request whose KV will arrive: `block_table` covers the prompt, and its first
    `num_cached_blocks` pages were found in the prefix cache, so that they need no transfer."""

    request_id: str
    block_table: tuple[int, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """How full an engine is; what placement decides on and what metrics show."""

    num_running: int
    num_waiting: int
    num_reserved: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int  # since start
    prefix_cache_queries: int  # tokens, since start
    prefix_cache_hits: int  # of them, found
