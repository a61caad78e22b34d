"""Which tokens of which requests the next step computes.

As in vLLM V1 (https://blog.vllm.ai/2025/01/27/v1-alpha-release.html) a request is only "how many of its
tokens are computed": prefill, chunked prefill, decode and mixed batches are one thing, tokens handed out
under a budget. The scheduler is a pure state machine; the engine's loop runs it:

    step = scheduler.schedule()
    submitted = runner.submit(step.plan)
    events = scheduler.apply(step, submitted.collect())

The next step may be planned while one is under way: between `schedule` and `apply` everything but the tokens
that the step samples is known (rows.py says who can go on without them). A step's result for a sequence that
ended meanwhile is dropped, and the sequence keeps its pages until no step that has a row of it is under way,
since such a step may be writing them. For the same reason nobody is preempted while a step is under way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.block_pool import BlockPool
from baton.core.new_tokens import take_tokens
from baton.core.plan import ScheduledRow, StepPlan, StepResult
from baton.core.request import (
    BlocksReserved,
    EngineRequest,
    LoadSnapshot,
    PagesReady,
    Phase,
    PromptLogprobs,
    SequenceState,
    TokenEvent,
)
from baton.core.reserved_blocks import ReservedBlocks
from baton.core.rows import choices_to_sample, num_ready_tokens, row_of
from baton.core.sampling import SampledToken
from baton.core.scheduler_limits import SchedulerConfig, require_servable
from baton.core.sequence_pages import SequencePages
from baton.core.sequence_phases import SequencePhases, num_slots
from baton.core.steps_under_way import StepsUnderWay


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan for the runner, whose rows they are, and of which choices each row samples a token."""

    plan: StepPlan
    sequences: tuple[SequenceState, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class StepEvents:
    """What a step produced."""

    tokens: list[TokenEvent] = field(default_factory=list)
    pages: list[PagesReady] = field(default_factory=list)
    prompts: list[PromptLogprobs] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # requests that can't go on, and why


class Scheduler:
    """The batch and the queue of one engine. Not thread-safe: the engine's thread owns it."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.num_preemptions = 0
        self._pages = SequencePages(pool, config.block_size)
        self._reserved = ReservedBlocks(pool, config.block_size, config.vocab_size)
        self._under_way = StepsUnderWay()
        self._sequences = SequencePhases(self._pages)
        self._num_arrivals = 0

    # --- requests come and go -----------------------------------------------------------------------

    def add(
        self, request: EngineRequest, *, hands_over: bool = False, export_from: int | None = None
    ) -> None:
        """Queue a request to be computed here.

        With `hands_over` it ends after its first tokens; with `export_from` its pages from that block of
        its table on come out as PagesReady. Raises InvalidRequest where it can never run here.
        """
        require_servable(request, 1 if hands_over else request.sampling.n, self.config)
        self._sequences.wait(SequenceState(request, 0, self._next_arrival(), export_from, hands_over))

    def reserve(self, request: EngineRequest) -> None:
        """Queue a request for pages that a transfer will fill; `admit_reservations` grants them.

        Raises InvalidRequest where it can never run here.
        """
        require_servable(request, request.sampling.n, self.config)
        self._reserved.queue(request, self._next_arrival())

    def admit_reservations(self) -> list[BlocksReserved]:
        """Grant queued reservations while pages and places in the batch last.

        They and the prompts that wait to be computed here have one order; a request that ran here already,
        and lost its pages, comes before all of them.
        """
        granted: list[BlocksReserved] = []
        while self._reserved.is_next(self._sequences.waiting):
            reserved = self._reserved.grant_next(self.config.max_num_seqs - self._num_slots_taken())
            if reserved is None:
                break
            granted.append(reserved)
        return granted

    def commit(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """The reserved pages hold the KV of all tokens: let the request's choices join the batch.

        `first_tokens` maps each choice that goes on, at least one, to the token after them. Unknown requests,
        aborted meanwhile, are ignored. Raises TransferRefused, and forgets the request, where there can't be
        such choices or tokens: in a step they would fail the others' as well.
        """
        reserved = self._reserved.take(request_id, first_tokens)
        if reserved is None:
            return
        first, *others = [
            SequenceState(reserved.request, choice, reserved.arrival) for choice in sorted(first_tokens)
        ]
        for sequence in (first, *others):
            sequence.output_token_ids.append(first_tokens[sequence.choice])
        first.block_table = list(reserved.block_table)
        first.num_computed_tokens = reserved.request.num_tokens
        self._pages.publish(first)
        self._sequences.run(first)
        for sequence in others:
            self._sequences.fork(first, sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and give its pages back; unknown ids are ignored (it may just have ended)."""
        self._reserved.drop(request_id)
        for sequence in tuple(self._sequences.of_request(request_id)):
            self._sequences.finish(sequence)

    def abort_choice(self, request_id: str, choice: int) -> None:
        """Forget one choice of a request, whether or not it has its first token."""
        for sequence in self._sequences.of_request(request_id):
            if not sequence.output_token_ids:  # the prompt, which every choice is still to fork from
                sequence.dropped_choices.add(choice)
                if not choices_to_sample(sequence):
                    self._sequences.finish(sequence)
                return
            if sequence.choice == choice:
                self._sequences.finish(sequence)
                return

    def release_pages(self, blocks: Sequence[int]) -> None:
        """A transfer is done with pages that PagesReady named."""
        self.pool.release(blocks)

    # --- steps --------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step, or None where there is nothing to compute, or nothing before a step under way
        has ended.

        Sequences that only miss one token go first, so that a long prompt never holds up a decode; then
        prompts under way; then waiting requests.
        """
        batch: dict[SequenceState, int] = {}
        num_preemptions = self.num_preemptions
        budget = self.config.max_num_batched_tokens
        for sequence, num_ready in self._ready():
            if budget > 0 and sequence.phase is Phase.RUNNING:
                count = min(num_ready, budget)
                end = sequence.num_planned_tokens + count
                if self._under_way and self._pages.num_missing(sequence, end) > self.pool.num_free:
                    return None  # a step under way may write the pages of whoever is to give way
                if self._make_room(sequence, end, batch):
                    batch[sequence] = count
                budget = self.config.max_num_batched_tokens - sum(batch.values())
        # With nothing else to compute, even after a preemption: a None would put the engine's loop to sleep.
        if self.num_preemptions == num_preemptions or not batch:
            self._admit_waiting(batch, budget)
        return self._planned(batch) if batch else None

    def _planned(self, batch: dict[SequenceState, int]) -> ScheduledStep:
        """The step that computes so many tokens of each sequence."""
        sequences = tuple(batch)
        rows = tuple(
            row_of(sequence, count, self._under_way.row_to_follow(sequence))
            for sequence, count in batch.items()
        )
        num_leaving = sum(
            self._pages.num_to_export(sequence, sequence.num_tokens)
            for sequence, row in zip(sequences, rows, strict=True)
            if _leaves(sequence, row)
        )
        choices = tuple(
            choices_to_sample(sequence) if row.samples else ()
            for sequence, row in zip(sequences, rows, strict=True)
        )
        self._under_way.begin(sequences, rows)
        return ScheduledStep(StepPlan(rows, self._pages.copies.take(), num_leaving), sequences, choices)

    def export_layers(self, step: ScheduledStep, end_layer: int) -> list[PagesReady]:
        """While `step` runs: all its K and V before `end_layer` are written, so that the pages of prompts
        that it completes can leave up to there."""
        return [
            self._pages.export_layers(sequence, sequence.num_tokens, end_layer)
            for sequence, row in zip(step.sequences, step.plan.rows, strict=True)
            if sequence.phase is Phase.RUNNING and _leaves(sequence, row)
        ]

    def apply(self, step: ScheduledStep, result: StepResult) -> StepEvents:
        """Take in what the runner computed for `step`; in the order of planning."""
        self._pages.copies.done(step.plan.block_copies)
        self._end_step(step)
        events = StepEvents()
        rows = zip(step.sequences, step.plan.rows, step.choices, result.samples, strict=True)
        for index, (sequence, row, choices, samples) in enumerate(rows):
            if sequence.phase is Phase.FINISHED:
                continue
            if tokens := result.prompts.get(index):
                events.prompts.append(PromptLogprobs(sequence.request.request_id, row.start + 1, tokens))
            sequence.num_computed_tokens = row.start + len(row.token_ids)
            self._pages.publish(sequence)
            if samples:
                self._take_samples(sequence, dict(zip(choices, samples, strict=True)), events)
            elif sequence.export_from is not None:
                events.pages.append(self._pages.export(sequence, is_last=False))
        return events

    def fail(self, step: ScheduledStep) -> list[str]:
        """The runner could not compute `step`: forget its requests, and say which they were.

        Every step that was planned before it must be over, and every one after it failed as well.
        """
        # Its copies may be for sequences that had no row in it: those go on, and still need them.
        self._pages.copies.retry(step.plan.block_copies)
        self._end_step(step)
        lost = [sequence for sequence in step.sequences if sequence.phase is not Phase.FINISHED]
        request_ids = list(dict.fromkeys(sequence.request.request_id for sequence in lost))
        for request_id in request_ids:
            self.abort(request_id)
        return request_ids

    def load(self) -> LoadSnapshot:
        """How full this engine is."""
        return LoadSnapshot(
            num_running=len(self._sequences.running),
            num_waiting=len(self._sequences.waiting) + self._reserved.num_queued,
            num_reserved=self._reserved.num_granted,
            num_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free,
            num_preemptions=self.num_preemptions,
            prefix_cache_queries=self.pool.num_queried_tokens,
            prefix_cache_hits=self.pool.num_hit_tokens,
        )

    # --- inside a step ------------------------------------------------------------------------------

    def _make_room(self, sequence: SequenceState, num_tokens: int, batch: dict[SequenceState, int]) -> bool:
        """Get pages for `num_tokens` tokens, preempting whoever goes last; False if that is itself."""
        missing = self._pages.num_missing(sequence, num_tokens)
        while missing > self.pool.num_free:
            self.num_preemptions += 1
            victim = self._sequences.preempt_last()
            batch.pop(victim, None)
            if victim is sequence:
                return False
        if missing > 0:
            self._pages.grow(sequence, missing)
        return True

    def _admit_waiting(self, batch: dict[SequenceState, int], budget: int) -> None:
        """Start waiting sequences in order, on cached prefixes where there are any."""
        while self._sequences.waiting and budget > 0:
            if self._sequences.running and self._reserved.is_next(self._sequences.waiting):
                return  # it needs what running sequences give back
            sequence = self._sequences.waiting[0]
            if self._num_slots_taken() + num_slots(sequence) > self.config.max_num_seqs:
                return
            count = self._pages.begin(sequence, budget)
            if count is None:
                return
            self._sequences.admit_first()
            batch[sequence] = count
            budget -= count

    def _ready(self) -> list[tuple[SequenceState, int]]:
        """Running sequences that need not wait for a step under way, in order, with the tokens they miss."""
        ready = [
            (sequence, count)
            for sequence in self._sequences.running
            if (count := num_ready_tokens(sequence, self.config.max_model_len))
        ]
        return sorted(ready, key=lambda entry: (entry[1] > 1, entry[0].order))

    def _end_step(self, step: ScheduledStep) -> None:
        """Nobody writes for `step` any more: what ended while it was under way gives its pages back."""
        for sequence in self._under_way.end(step.sequences, step.plan.rows):
            self._pages.drop(sequence)

    def _take_samples(
        self, sequence: SequenceState, samples: dict[int, SampledToken], events: StepEvents
    ) -> None:
        """`samples`: the token of each choice."""
        if (failure := sequence.failure) is not None:
            request_id = sequence.request.request_id
            events.failures[request_id] = failure
            self.abort(request_id)
            return
        going_on, tokens = take_tokens(sequence, samples, self.config.max_model_len)
        events.tokens.extend(tokens)
        if sequence.export_from is not None and going_on:
            events.pages.append(self._pages.export(sequence, is_last=True))
        if not sequence.hands_over:
            for sibling in going_on:
                if sibling is not sequence:
                    self._sequences.fork(sequence, sibling)
        if sequence.hands_over or sequence not in going_on:
            self._sequences.finish(sequence)

    def _num_slots_taken(self) -> int:
        return self._sequences.num_slots_taken + self._reserved.num_slots

    def _next_arrival(self) -> int:
        self._num_arrivals += 1
        return self._num_arrivals


def _leaves(sequence: SequenceState, row: ScheduledRow) -> bool:
    """Whether the step completes a prompt whose pages go to another server."""
    return sequence.export_from is not None and bool(row.samples)
