"""A scheduler with everything around it that a worker has, and checks on all that comes out of it."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from baton.core.block_pool import BlockPool
from baton.core.plan import ScheduledRow
from baton.core.prefix import block_hashes
from baton.core.request import BlocksReserved, EngineRequest, PagesReady, Phase, TokenEvent
from baton.core.scheduler import ScheduledStep, Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from tests.core.engine_requests import alone
from tests.core.fake_runner import FakeRunner, FakeStep, Slot


class Role(Enum):
    """What a request is on this worker."""

    WHOLE = "whole"  # prefill and decode here
    PREFILL = "prefill"  # handed over after its first tokens
    DECODE = "decode"  # its pages come from elsewhere


@dataclass
class Tracked:
    """What the outside knows of one request."""

    request: EngineRequest
    role: Role
    outcomes: tuple[tuple[tuple[int, ...], object], ...]  # of each choice, from a run alone
    outputs: dict[int, list[int]] = field(default_factory=dict)
    open_choices: set[int] = field(default_factory=set)
    reserved: BlocksReserved | None = None
    missing_blocks: set[int] = field(default_factory=set)  # that the transfer has not written yet
    next_export: int = 0
    is_computed_here: bool = True  # False until the commit, if it is prefilled elsewhere

    @property
    def given(self) -> tuple[int, ...]:
        """Tokens of prompt and answer that were there before the request came."""
        return (*self.request.prompt_token_ids, *self.request.answered_token_ids)

    @property
    def num_at_hand_over(self) -> int:
        """Tokens of output that decode begins with."""
        return len(self.request.answered_token_ids) + 1


@dataclass(frozen=True)
class Export:
    """Pages that a transfer still reads, and what was in them when it got them."""

    blocks: tuple[int, ...]
    content: tuple[tuple[Slot | None, ...], ...]


class SchedulerWorld:
    """Drives one scheduler as engine loop and services would; every method checks what it sees."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, depth: int = 1) -> None:
        """`depth`: the runner's; with 2, all that happens may happen while a step is under way."""
        self.config = config
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(config, self.pool)
        self.runner = FakeRunner(num_blocks, config.block_size, depth)
        self.under_way: list[tuple[ScheduledStep, FakeStep]] = []
        self.live: dict[str, Tracked] = {}
        self.exports: list[Export] = []
        self.names: dict[bytes, tuple[int, ...]] = {}  # digest of a block: all tokens up to its end

    # --- what services do ---------------------------------------------------------------------------

    def add(self, request: EngineRequest, *, export_from: int | None = None) -> None:
        """Queue a request, handing it over if `export_from` is set."""
        role = Role.WHOLE if export_from is None else Role.PREFILL
        self.scheduler.add(request, hands_over=role is Role.PREFILL, export_from=export_from)
        tracked = self._track(request, role)
        tracked.next_export = export_from or 0

    def reserve(self, request: EngineRequest) -> None:
        """Ask for pages of a request that is prefilled elsewhere."""
        self.scheduler.reserve(request)
        tracked = self._track(request, Role.DECODE)
        tracked.is_computed_here = False
        for choice, (expected, _) in enumerate(tracked.outcomes):
            tracked.outputs[choice] = list(expected[: tracked.num_at_hand_over])
        tracked.open_choices = {
            choice
            for choice, (expected, _) in enumerate(tracked.outcomes)
            if len(expected) > tracked.num_at_hand_over
        }

    def admit_reservations(self) -> bool:
        """Grant what can be granted; returns whether anything was."""
        granted = self.scheduler.admit_reservations()
        for reserved in granted:
            tracked = self.live[reserved.request_id]
            assert tracked.reserved is None, "granted twice"
            self._check_grant(tracked, reserved)
            tracked.reserved = reserved
            tracked.missing_blocks = set(range(reserved.num_cached_blocks, self._num_blocks(tracked.given)))
        return bool(granted)

    def receive_block(self, tracked: Tracked, index: int) -> None:
        """The transfer writes one block of a granted reservation."""
        assert tracked.reserved is not None
        self.runner.fill_block(tracked.reserved.block_table, index, tracked.given)
        tracked.missing_blocks.discard(index)

    def commit(self, tracked: Tracked) -> None:
        """The transfer is complete; a request that its first tokens ended is not handed over at all."""
        assert not tracked.missing_blocks
        tracked.reserved = None
        tracked.is_computed_here = True
        if tracked.open_choices:
            self.scheduler.commit(
                tracked.request.request_id,
                {choice: tracked.outputs[choice][-1] for choice in tracked.open_choices},
            )
        else:
            self.abort(tracked.request.request_id)

    def abort(self, request_id: str) -> None:
        """The client has gone."""
        self.scheduler.abort(request_id)
        self.live.pop(request_id, None)

    def abort_choice(self, tracked: Tracked, choice: int) -> None:
        """A stop string was found in one choice."""
        self.scheduler.abort_choice(tracked.request.request_id, choice)
        self._close(tracked, choice)

    def release_export(self, index: int) -> None:
        """A transfer has sent some pages."""
        self.scheduler.release_pages(self.exports.pop(index).blocks)

    # --- what the engine loop does ------------------------------------------------------------------

    def step(self) -> bool:
        """One turn: plan and submit, and collect a step where that is due; returns whether there was one."""
        step = self.scheduler.schedule()
        if step is not None:
            self._submit(step)
        elif not self.under_way:
            self._check_idle()
            return False
        if step is None or len(self.under_way) == self.runner.depth:
            self.collect()
        return True

    def collect(self) -> None:
        """Apply what the first step under way has computed."""
        step, submitted = self.under_way.pop(0)
        result = submitted.collect()
        leaving = self.scheduler.export_layers(step, 1)
        ended = [sequence for sequence in step.sequences if sequence.phase is Phase.FINISHED]
        num_leaving = sum(len(pages.blocks) for pages in leaving)
        assert num_leaving == step.plan.num_leaving_blocks or ended
        for pages in leaving:
            self._take_layers(pages)
        events = self.scheduler.apply(step, result)
        last_exports = {pages.request_id for pages in events.pages if pages.is_last}
        for pages in events.pages:
            self._take_pages(pages)
        for token in events.tokens:
            self._take_token(token, handed_over=token.request_id in last_exports)

    def compute(self) -> None:
        """The device gets on with the steps under way, before anybody asks for what they give."""
        for _, submitted in self.under_way:
            submitted.compute()

    def fail_submission(self, *, after_running: bool) -> None:
        """A step that can't be submitted; whether its writes happened is not known to the scheduler."""
        step = self.scheduler.schedule()
        if step is None:
            return
        if after_running:
            self.runner.run(step.plan)
        while self.under_way:
            self.collect()
        self._fail(step)

    def fail_steps(self, *, after_running: bool) -> None:
        """The first step under way fails, and those after it with it."""
        if not self.under_way:
            step = self.scheduler.schedule()
            if step is None:
                return
            self._submit(step)
        if after_running:
            self.compute()
        self.runner.forget_steps()
        for step, _ in self.under_way:
            self._fail(step)
        self.under_way = []

    def _submit(self, step: ScheduledStep) -> None:
        self._check_step(step)
        known = [
            [*sequence.request.prompt_token_ids, *sequence.output_token_ids] for sequence in step.sequences
        ]
        self.under_way.append((step, self.runner.submit(step.plan, known=known)))

    def _fail(self, step: ScheduledStep) -> None:
        lost = [sequence for sequence in step.sequences if sequence.phase is not Phase.FINISHED]
        failed = self.scheduler.fail(step)
        assert set(failed) == {sequence.request.request_id for sequence in lost}
        assert len(failed) == len(set(failed))
        for request_id in failed:
            del self.live[request_id]

    def drain(self) -> None:
        """Let everything end; fails where the scheduler does not get there."""
        for _ in range(20_000):
            while self.exports:
                self.release_export(0)
            for tracked in list(self.live.values()):
                if tracked.reserved is not None:
                    for index in sorted(tracked.missing_blocks):
                        self.receive_block(tracked, index)
                    self.commit(tracked)
            granted = self.admit_reservations()
            if not self.step() and not granted and not self.exports:
                break
            self.check()
        assert not self.live, f"never ended: {sorted(self.live)}"
        load = self.scheduler.load()
        assert (load.num_running, load.num_waiting, load.num_reserved) == (0, 0, 0)
        assert self.pool.num_free == self.pool.num_blocks, "pages leaked"

    # --- checks -------------------------------------------------------------------------------------

    def check(self) -> None:
        """What holds between any two calls."""
        self.pool.check_integrity()
        load = self.scheduler.load()
        granted = [tracked for tracked in self.live.values() if tracked.reserved is not None]
        num_reserved_slots = sum(tracked.request.sampling.n for tracked in granted)
        assert load.num_reserved == len(granted)
        assert load.num_running + num_reserved_slots <= self.config.max_num_seqs
        for export in self.exports:
            assert self._content(export.blocks) == export.content, "a page changed under its transfer"
        for tracked in granted:
            self._check_received(tracked)
        self._check_prefix_cache()
        self._check_writers()

    def _check_step(self, step: ScheduledStep) -> None:
        plan = step.plan
        assert plan.rows, "an empty step"
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(step.sequences) == len(set(map(id, step.sequences))) <= self.config.max_num_seqs
        plans = [plan, *(other.plan for other, _ in self.under_way)]
        copy_holds = Counter(page for each in plans for copy in each.block_copies for page in copy)
        for page in self._written_by(step):
            assert self.pool.reference_count(page) - copy_holds[page] == 1, f"page {page} is shared"
            assert page not in self._transferred(), f"page {page} belongs to a transfer"
        for row, sequence in zip(plan.rows, step.sequences, strict=True):
            if row.follows is not None:
                before = self.under_way[-1][0]
                assert before.sequences[row.follows] is sequence, "a row follows another sequence's"

    def _check_writers(self) -> None:
        """What a step under way may still write is nobody else's, whatever became of its sequences."""
        for step, _ in self.under_way:
            for page in self._written_by(step):
                assert self.pool.reference_count(page) > 0, f"page {page} is free while a step writes it"
                assert page not in self._transferred(), f"page {page} is a transfer's while a step writes it"

    def _written_by(self, step: ScheduledStep) -> list[int]:
        written = [destination for _, destination in step.plan.block_copies]
        for row in step.plan.rows:
            first, last = (position // self.config.block_size for position in (row.start, _end(row) - 1))
            written += row.block_table[first : last + 1]
        return written

    def _transferred(self) -> set[int]:
        """Pages that transfers read or write."""
        pages = {block for export in self.exports for block in export.blocks}
        for tracked in self.live.values():
            if tracked.reserved is not None:
                pages.update(tracked.reserved.block_table)
        return pages

    def _check_idle(self) -> None:
        """The engine loop sleeps after a None: nothing may be possible that needs no event from outside."""
        assert self.scheduler.load().num_running == 0, "nothing to compute, though sequences run"
        assert self.scheduler.schedule() is None, "asked again, there was something to compute"
        holders = self.exports or any(tracked.reserved for tracked in self.live.values())
        if not holders:
            assert self.pool.num_free == self.pool.num_blocks, "idle, but not all pages are free"
            assert all(tracked.role is Role.DECODE for tracked in self.live.values()), "a request is stuck"

    def _check_grant(self, tracked: Tracked, reserved: BlocksReserved) -> None:
        num_cached = reserved.num_cached_blocks * self.config.block_size
        assert len(reserved.block_table) == len(tracked.given) // self.config.block_size + 1
        self.runner.check_tokens(reserved.block_table, 0, num_cached, tracked.given)
        for page in reserved.block_table[reserved.num_cached_blocks :]:
            assert self.pool.reference_count(page) == 1, "a transfer would write a shared page"

    def _check_received(self, tracked: Tracked) -> None:
        assert tracked.reserved is not None
        size = self.config.block_size
        for index in set(range(self._num_blocks(tracked.given))) - tracked.missing_blocks:
            end = min((index + 1) * size, len(tracked.given))
            self.runner.check_tokens(tracked.reserved.block_table, index * size, end, tracked.given)

    def _check_prefix_cache(self) -> None:
        """A page that has a name holds what the name says, from the moment that it can be found."""
        for digest, tokens in self.names.items():
            for page in self.pool.find_prefix([digest]):
                start = len(tokens) - self.config.block_size
                index = start // self.config.block_size
                self.runner.check_tokens([page] * (index + 1), start, len(tokens), tokens)

    def _take_token(self, event: TokenEvent, *, handed_over: bool) -> None:
        tracked = self.live[event.request_id]
        output = tracked.outputs.setdefault(event.choice, [])
        assert event.choice in tracked.open_choices, "a token of a choice that had ended"
        assert event.position == len(output), "tokens lost or repeated"
        output.append(event.token.token_id)
        expected, reason = tracked.outcomes[event.choice]
        assert tuple(output) == expected[: len(output)], "another token than alone"
        assert event.finish_reason == (reason if len(output) == len(expected) else None)
        self._check_cached_prompt_tokens(tracked, event)
        if event.finish_reason is not None or tracked.role is Role.PREFILL:
            self._expect_hand_over(tracked, event, handed_over)
            self._name_blocks(tracked, output)
            self._close(tracked, event.choice)

    def _expect_hand_over(self, tracked: Tracked, event: TokenEvent, handed_over: bool) -> None:
        if tracked.role is Role.PREFILL:
            goes_on = any(len(expected) > tracked.num_at_hand_over for expected, _ in tracked.outcomes)
            assert handed_over == goes_on, f"{event.request_id}: its last pages came out if it goes on"

    def _check_cached_prompt_tokens(self, tracked: Tracked, event: TokenEvent) -> None:
        assert event.num_cached_prompt_tokens % self.config.block_size == 0
        assert event.num_cached_prompt_tokens < len(tracked.given)
        if event.position > 0 or event.choice > 0:
            assert event.num_cached_prompt_tokens == 0

    def _take_layers(self, pages: PagesReady) -> None:
        """The first layer of pages that the step under way completes."""
        tracked = self.live[pages.request_id]
        assert tracked.role is Role.PREFILL
        assert not pages.is_last
        assert (pages.first_block, pages.first_layer, pages.end_layer) == (tracked.next_export, 0, 1)
        assert pages.first_block + len(pages.blocks) == max(
            pages.first_block, self._num_blocks(tracked.given)
        )
        self.exports.append(Export(pages.blocks, self._content(pages.blocks)))

    def _take_pages(self, pages: PagesReady) -> None:
        tracked = self.live[pages.request_id]
        assert (pages.first_layer, pages.end_layer) == (int(pages.is_last), None)
        assert tracked.role is Role.PREFILL
        assert pages.first_block == tracked.next_export, "exported blocks are not contiguous"
        tracked.next_export += len(pages.blocks)
        if pages.is_last:
            assert tracked.next_export == self._num_blocks(tracked.given), "not the whole prompt came out"
        size = self.config.block_size
        table = [0] * pages.first_block + list(pages.blocks)
        end = len(tracked.given) if pages.is_last else len(table) * size
        self.runner.check_tokens(table, pages.first_block * size, end, tracked.given)
        self.exports.append(Export(pages.blocks, self._content(pages.blocks)))

    # --- bookkeeping --------------------------------------------------------------------------------

    def _track(self, request: EngineRequest, role: Role) -> Tracked:
        outcomes = alone(request.prompt_token_ids, request.sampling, self.config.max_model_len)
        tracked = Tracked(request, role, outcomes, open_choices=set(range(request.sampling.n)))
        self.live[request.request_id] = tracked
        tracked.outputs[0] = list(request.answered_token_ids)
        self._name_blocks(tracked, tracked.outputs[0])
        return tracked

    def _close(self, tracked: Tracked, choice: int) -> None:
        tracked.open_choices.discard(choice)
        if not tracked.open_choices:
            self.live.pop(tracked.request.request_id, None)

    def _name_blocks(self, tracked: Tracked, output: list[int]) -> None:
        tokens = (*tracked.request.prompt_token_ids, *output)
        size = self.config.block_size
        for index, digest in enumerate(block_hashes(tracked.request.hash_seed, tokens, size)):
            self.names[digest] = tokens[: (index + 1) * size]

    def _content(self, blocks: tuple[int, ...]) -> tuple[tuple[Slot | None, ...], ...]:
        return tuple(tuple(self.runner.pages[block]) for block in blocks)

    def _num_blocks(self, tokens: tuple[int, ...]) -> int:
        return -(-len(tokens) // self.config.block_size)


def _end(row: ScheduledRow) -> int:
    return row.start + len(row.token_ids)
