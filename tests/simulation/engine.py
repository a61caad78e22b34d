"""An engine in virtual time: what EngineLoop and AsyncEngine do on a thread; its steps take their time."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from baton.core.block_pool import BlockPool
from baton.core.commands import (
    AbortRequest,
    CommitRequest,
    EngineCommand,
    EngineOutput,
    FailureReason,
    ReleasePages,
    RequestFailure,
    ReserveBlocks,
)
from baton.core.request import BlocksReserved, PagesReady
from baton.core.scheduler import ScheduledStep, Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from tests.simulation.cases import MAX_MODEL_LEN, VOCABULARY_SIZE
from tests.simulation.pages import NUM_LAYERS, Pages
from tests.simulation.runner import PageRunner
from tests.simulation.schedule import Violation

if TYPE_CHECKING:
    from tests.simulation.world import World

MAX_NUM_SEQS = 4
THREAD_HOP = 0.0003  # between the event loop's thread and the engine's


class VirtualEngine:
    """Real scheduler and pool, a fake runner, and checks on every page that is written or given back."""

    def __init__(
        self,
        world: "World",
        name: str,
        pages: Pages,
        max_num_batched_tokens: int,
        step_time: float,
        emit: Callable[[EngineOutput], None],
    ) -> None:
        self.pool = BlockPool(pages.num_blocks)
        self.scheduler = Scheduler(_config(pages.layout.block_size, max_num_batched_tokens), self.pool)
        self.runner = PageRunner(name, pages)
        self.fails_next_step = False
        self.is_dead = False
        self._world = world
        self._name = name
        self._pages = pages
        self._step_time = step_time
        self._num_steps = 0
        self._emit_now = emit
        self._commands: list[EngineCommand] = []
        self._is_asleep = True

    def submit(self, command: EngineCommand) -> None:
        """It takes effect before the next step."""
        self._commands.append(command)
        if self._is_asleep:
            self._is_asleep = False
            self._world.after(THREAD_HOP, self._iterate)

    # --- the thread ---------------------------------------------------------------------------------

    def _iterate(self) -> None:
        if self.is_dead:
            return
        commands, self._commands = self._commands, []
        for command in commands:
            self._execute(command)
        reserved = self.scheduler.admit_reservations()
        for grant in reserved:
            self._note_grant(grant)
        step = self.scheduler.schedule()
        if reserved:
            self._emit(EngineOutput(_NO_LOAD, reserved=reserved))
        if self.scheduler._reserved.num_queued:
            self._world.count["reservation waits for pages"] += 1
        if step is None:
            self._is_asleep = True
            self._check_writers()
        else:
            self._begin(step)

    def _execute(self, command: EngineCommand) -> None:
        scheduler = self.scheduler
        if isinstance(command, ReleasePages):
            self._note_release(command.blocks)
            scheduler.release_pages(command.blocks)
        elif isinstance(command, AbortRequest) and command.choice is not None:
            scheduler.abort_choice(command.request_id, command.choice)
        elif isinstance(command, AbortRequest):
            self._pages.end_writes(command.request_id)
            scheduler.abort(command.request_id)
        elif isinstance(command, CommitRequest):
            scheduler.commit(command.request_id, command.first_tokens)
        elif isinstance(command, ReserveBlocks):
            scheduler.reserve(command.request)
        else:
            scheduler.add(command.request, hands_over=command.hands_over, export_from=command.export_from)

    def _begin(self, step: ScheduledStep) -> None:
        """All layers but the last one; what the step completes leaves up to there."""
        self._check_writes(step)
        self.runner.begin(step)
        for layer in range(NUM_LAYERS - 1):
            self.runner.compute(layer)
            if step.plan.num_leaving_blocks:
                pages = self.scheduler.export_layers(step, layer + 1)
                self._note_exports(pages)
                self._world.count["export inside a step"] += 1
                self._emit(EngineOutput(_NO_LOAD, pages=pages, is_within_step=True))
        # While a stalled transfer holds pages that a prompt lacks, the engine begins the prompt and preempts
        # it over and over. Slower and slower, lest a schedule take for ever.
        self._num_steps += 1
        step_time = self._step_time * 2 ** (self._num_steps // 32)
        self._world.after(step_time, self._finish, step)

    def _finish(self, step: ScheduledStep) -> None:
        if self.is_dead:
            return
        self.runner.compute(NUM_LAYERS - 1)
        if self.fails_next_step:
            self._fail(step)
        else:
            events = self.scheduler.apply(step, self.runner.sample())
            self._note_exports(events.pages)
            if events.tokens or events.pages:
                self._emit(EngineOutput(_NO_LOAD, tokens=events.tokens, pages=events.pages))
        self._iterate()

    def _fail(self, step: ScheduledStep) -> None:
        self.fails_next_step = False
        request_ids = self.scheduler.fail(step)
        self._world.log(f"{self._name}: a step of {', '.join(request_ids)} fails")
        failures = [RequestFailure(request_id, FailureReason.INTERNAL, "") for request_id in request_ids]
        self._emit(EngineOutput(_NO_LOAD, failures=failures))

    def _emit(self, output: EngineOutput) -> None:
        self._world.after(THREAD_HOP, self._receive, output)

    def _receive(self, output: EngineOutput) -> None:
        if not self.is_dead:
            self._emit_now(output)

    # --- checks -------------------------------------------------------------------------------------

    def _note_grant(self, grant: BlocksReserved) -> None:
        """From here on the request's transfer writes the pages that were not cached."""
        for block in grant.block_table[grant.num_cached_blocks :]:
            if self._pages.writers[block] is not None:
                raise Violation(
                    f"page {block} is given to {grant.request_id}, but {self._pages.writers[block]} writes it"
                )
            self._pages.writers[block] = grant.request_id
        if grant.num_cached_blocks:
            self._world.count["pages found in decode's prefix cache"] += 1

    def _note_exports(self, exports: list[PagesReady]) -> None:
        for pages in exports:
            for block in pages.blocks:
                self._pages.holds[block] += 1

    def _note_release(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            self._pages.holds[block] -= 1
            if self._pages.holds[block] < 0:
                raise Violation(f"prefill's page {block} is released more often than it was held")

    def _check_writes(self, step: ScheduledStep) -> None:
        """The step may write only pages that one sequence alone holds, and no transfer writes."""
        copies = step.plan.block_copies
        copy_holds = Counter(page for copy in copies for page in copy) if copies else {}
        written = [destination for _, destination in copies]
        size = self._pages.layout.block_size
        for row in step.plan.rows:
            last = (row.start + len(row.token_ids) - 1) // size
            written += row.block_table[row.start // size : last + 1]
        for page in written:
            if self.pool.reference_count(page) - copy_holds.get(page, 0) != 1:
                raise Violation(f"{self._name}'s engine writes page {page}, which is shared")
            writer = self._pages.writers[page]
            if writer is not None:
                raise Violation(f"{self._name}'s engine writes page {page}, as {writer}'s transfer does")

    def _check_writers(self) -> None:
        for block, writer in enumerate(self._pages.writers):
            if writer is not None and self.pool.reference_count(block) != 1:
                count = self.pool.reference_count(block)
                raise Violation(f"page {block} is written by {writer}'s transfer and held {count} times")

    def check_idle(self) -> None:
        """All has ended: nothing is left of it."""
        self.pool.check_integrity()
        load = self.scheduler.load()
        counts = (load.num_running, load.num_waiting, load.num_reserved, len(self._commands))
        if any(counts) or self.scheduler._sequences._by_request:
            raise Violation(f"{self._name}: {counts} running, waiting, reserved or commanded in the end")
        if load.num_free_blocks != load.num_blocks:
            raise Violation(f"{self._name}: {load.num_blocks - load.num_free_blocks} pages leaked")
        if any(self._pages.holds) or any(self._pages.writers) or self.scheduler._pages.copies._pending:
            raise Violation(f"{self._name}: a page is still held, written or copied in the end")


@cache
def _config(block_size: int, max_num_batched_tokens: int) -> SchedulerConfig:
    return SchedulerConfig(block_size, MAX_MODEL_LEN, MAX_NUM_SEQS, max_num_batched_tokens, VOCABULARY_SIZE)


_NO_LOAD = Scheduler(SchedulerConfig(1, 2, 1, 1, 1), BlockPool(1)).load()
