"""A runner without tensors that checks what it reads: every slot must hold what its reader computed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from baton.core.plan import SampleTask, ScheduledRow, StepPlan, StepResult
from baton.core.ports import LayersDone
from baton.core.sampling import SampledToken

VOCABULARY_SIZE = 6  # small, so that stop tokens come up
_EMPTY_PREFIX = 0


class Slot(NamedTuple):
    """What stands for one token's K and V: they depend on the token and on all tokens before it."""

    position: int
    token_id: int
    prefix: int  # identity of the tokens up to and with this one


class FakeStep:
    """Implements `baton.core.ports.SubmittedStep`: computed when asked for, at the latest when collected."""

    def __init__(
        self,
        runner: "FakeRunner",
        plan: StepPlan,
        known: Sequence[Sequence[int]] | None,
        before: "FakeStep | None",
    ) -> None:
        self._runner = runner
        self._plan = plan
        self._known = known
        self._before = before
        self._result: StepResult | None = None

    def compute(self) -> StepResult:
        """As a device does: after all steps before it, and once."""
        if self._result is None:
            previous = None if self._before is None else self._before.compute()
            self._before = None
            known = self._known
            if known is not None:
                known = [
                    [*tokens, *_followed(row, previous)]
                    for tokens, row in zip(known, self._plan.rows, strict=True)
                ]
            self._result = self._runner.compute(_resolved(self._plan, previous), known)
        return self._result

    def collect(self) -> StepResult:
        """See SubmittedStep."""
        return self.compute()


class FakeRunner:
    """Implements `baton.core.ports.Runner` on pages of slots."""

    def __init__(self, num_blocks: int, block_size: int, depth: int = 1) -> None:
        self.depth = depth
        self.block_size = block_size
        self.pages: list[list[Slot | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._last: FakeStep | None = None

    def submit(
        self,
        plan: StepPlan,
        layers_done: LayersDone | None = None,
        *,
        known: Sequence[Sequence[int]] | None = None,
    ) -> FakeStep:
        """Keep a copy of `plan`, whose lists may be others' by the time that it is computed; tell no layers.

        `known[r]`, where given, are all tokens of the sequence of row `r`, but for the one that it follows.
        Without `known`, a row's computed tokens need only be some sequence until the row samples.
        """
        self._last = FakeStep(self, _copied(plan), known, self._last)
        return self._last

    def run(self, plan: StepPlan) -> StepResult:
        """Submit and collect."""
        return self.submit(plan).collect()

    def idle(self) -> None:
        """See Runner."""

    def forget_steps(self) -> None:
        """What was submitted and not computed has failed: it never will be."""
        self._last = None

    def compute(self, plan: StepPlan, known: Sequence[Sequence[int]] | None) -> StepResult:
        """Check, write and sample a step whose rows have all their tokens."""
        for source, destination in plan.block_copies:
            self.pages[destination] = list(self.pages[source])
        self._require_disjoint_writes(plan.rows)
        # No row may read what another one writes in the same step: all checks come before all writes.
        prefixes = [
            self._check_row(row, None if known is None else known[index])
            for index, row in enumerate(plan.rows)
        ]
        for row, prefix in zip(plan.rows, prefixes, strict=True):
            self._write(row.block_table, row.start, row.token_ids, prefix)
        return StepResult(tuple(self._sample_row(row) for row in plan.rows))

    def fill_block(self, block_table: Sequence[int], index: int, token_ids: Sequence[int]) -> None:
        """Write block `index` of a prompt as a transfer from a prefill server would."""
        start, end = index * self.block_size, (index + 1) * self.block_size
        self._write(block_table, start, token_ids[start:end], prefix_identity(token_ids[:start]))

    def check_tokens(self, block_table: Sequence[int], start: int, end: int, tokens: Sequence[int]) -> None:
        """Assert that positions [start, end) hold exactly `tokens[start:end]` in their context."""
        prefix = prefix_identity(tokens[:start])
        for position in range(start, end):
            prefix = _extend(prefix, tokens[position])
            found = self._slot(block_table, position)
            expected = Slot(position, tokens[position], prefix)
            page = block_table[position // self.block_size]
            assert found == expected, f"page {page}: found {found}, but its reader computed {expected}"

    def _check_row(self, row: ScheduledRow, known: Sequence[int] | None) -> int:
        """Check positions [0, start) of a row; returns the identity of their tokens."""
        end = row.start + len(row.token_ids)
        assert row.token_ids, "a row without tokens"
        assert end <= len(row.block_table) * self.block_size, "the block table does not cover the row"
        before = self._tokens_before(row) if known is None else list(known[: row.start])
        self.check_tokens(row.block_table, 0, row.start, before)
        if known is not None:
            assert list(row.token_ids) == list(known[row.start : end])
            assert bool(row.samples) == (end == len(known)), "samples exactly at the last known token"
        for task in row.samples:
            assert task.position == end
            known_to_task = [*task.prompt_token_ids, *task.output_token_ids]
            followed = [] if row.follows is None else row.token_ids
            assert not (followed and task.params.has_penalties), "penalties need all tokens"
            assert [*known_to_task, *followed] == [*before, *row.token_ids]
        return prefix_identity(before)

    def _tokens_before(self, row: ScheduledRow) -> list[int]:
        slots = [self._slot(row.block_table, position) for position in range(row.start)]
        assert None not in slots, f"a row starts at {row.start}, but not all before it is computed"
        return [slot.token_id for slot in slots if slot is not None]

    def _require_disjoint_writes(self, rows: Sequence[ScheduledRow]) -> None:
        written = [
            (row.block_table[position // self.block_size], position % self.block_size)
            for row in rows
            for position in range(row.start, row.start + len(row.token_ids))
        ]
        assert len(written) == len(set(written)), "two rows of a step write the same slot"

    def _write(self, block_table: Sequence[int], start: int, token_ids: Sequence[int], prefix: int) -> None:
        for position, token_id in enumerate(token_ids, start):
            prefix = _extend(prefix, token_id)
            page = self.pages[block_table[position // self.block_size]]
            page[position % self.block_size] = Slot(position, token_id, prefix)

    def _sample_row(self, row: ScheduledRow) -> tuple[SampledToken, ...]:
        # From the pages, as a model would, and not from the lists in the task.
        last = self._slot(row.block_table, row.start + len(row.token_ids) - 1)
        assert last is not None
        return tuple(SampledToken(sample(last.prefix, task)) for task in row.samples)

    def _slot(self, block_table: Sequence[int], position: int) -> Slot | None:
        return self.pages[block_table[position // self.block_size]][position % self.block_size]


def _copied(plan: StepPlan) -> StepPlan:
    """The plan with lists of its own."""
    rows = tuple(
        replace(
            row,
            block_table=list(row.block_table),
            samples=tuple(
                replace(task, output_token_ids=list(task.output_token_ids)) for task in row.samples
            ),
        )
        for row in plan.rows
    )
    return replace(plan, rows=rows)


def _resolved(plan: StepPlan, previous: StepResult | None) -> StepPlan:
    """The plan with the tokens that the step before has sampled, in the rows that follow."""
    return replace(
        plan,
        rows=tuple(
            row if row.follows is None else replace(row, token_ids=_followed(row, previous))
            for row in plan.rows
        ),
    )


def _followed(row: ScheduledRow, previous: StepResult | None) -> list[int]:
    if row.follows is None:
        return []
    assert previous is not None, "a row follows, but no step came before"
    assert list(row.token_ids) == [0]
    [token] = previous.samples[row.follows]
    return [token.token_id]


def sample(prefix: int, task: SampleTask) -> int:
    """The next token: depends on all tokens so far, the choice's seed and the position, on nothing else."""
    token_id = hash((prefix, task.seed, task.position)) % VOCABULARY_SIZE
    if task.num_output_tokens < task.params.min_tokens:
        while token_id in task.params.stop_token_ids:
            token_id = (token_id + 1) % VOCABULARY_SIZE
    return token_id


def prefix_identity(token_ids: Sequence[int]) -> int:
    """Identity of a sequence of tokens."""
    prefix = _EMPTY_PREFIX
    for token_id in token_ids:
        prefix = _extend(prefix, token_id)
    return prefix


def _extend(prefix: int, token_id: int) -> int:
    return hash((prefix, token_id))  # a tuple of ints: the same in every process
