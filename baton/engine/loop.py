"""The thread that runs the engine: plan, run, apply. The event loop talks to it through two queues."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from baton.core.commands import (
    AbortRequest,
    AddRequest,
    CommitRequest,
    EngineCommand,
    EngineOutput,
    FailureReason,
    ReleasePages,
    RequestFailure,
    ReserveBlocks,
    StepTimes,
)
from baton.core.errors import InvalidRequest
from baton.core.ports import LayersDone, Runner
from baton.core.scheduler import ScheduledStep, Scheduler

logger = logging.getLogger(__name__)


class EngineLoop:
    """Owns scheduler and runner from `start` to `stop`; nobody else may touch them meanwhile.

    `emit` is called on the engine's thread with everything that happened, at most twice a step: once
    before the step runs, if commands had answers, and once after it. `on_crash` is called there if the
    engine can't go on: what its scheduler holds is not to be trusted any more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        emit: Callable[[EngineOutput], None],
        on_crash: Callable[[Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._emit = emit
        self._on_crash = on_crash
        # Unbounded, but what it holds is not: a command each for requests that the services bound, and one
        # each for aborts and page releases of those.
        self._commands: queue.SimpleQueue[EngineCommand | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._last_load = scheduler.load()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: EngineCommand) -> None:
        """Hand a command to the engine; it takes effect before the next step. Any thread."""
        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """Stop after the step under way; returns whether the thread ended in time."""
        self._commands.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logger.exception("the engine has stopped")
            self._on_crash(error)

    def _serve(self) -> None:
        must_wait = True
        while True:
            commands = self._take_commands(must_wait)
            if None in commands:
                return
            failures = [failure for command in commands if (failure := self._execute(command))]
            reserved = self._scheduler.admit_reservations()
            step = self._scheduler.schedule()
            if reserved or failures or step is None:
                self._report(EngineOutput(self._scheduler.load(), reserved=reserved, failures=failures))
            if step is not None:
                self._report(self._compute(step))
            else:
                self._runner.idle()
            must_wait = step is None

    def _take_commands(self, must_wait: bool) -> list[EngineCommand | None]:
        """Everything that is queued; at least one command if there is nothing to compute."""
        commands = [self._commands.get()] if must_wait else []
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _execute(self, command: EngineCommand | None) -> RequestFailure | None:
        try:
            match command:
                case AddRequest(request, hands_over, export_from, told):
                    self._scheduler.add(
                        request, hands_over=hands_over, export_from=export_from, told_first_tokens=told
                    )
                case ReserveBlocks(request):
                    self._scheduler.reserve(request)
                case CommitRequest(request_id, first_tokens):
                    self._scheduler.commit(request_id, first_tokens)
                case AbortRequest(request_id, None):
                    self._scheduler.abort(request_id)
                case AbortRequest(request_id, int(choice)):
                    self._scheduler.abort_choice(request_id, choice)
                case ReleasePages(blocks):
                    self._scheduler.release_pages(blocks)
        except InvalidRequest as error:
            assert isinstance(command, AddRequest | ReserveBlocks)
            return RequestFailure(command.request.request_id, FailureReason.INVALID, str(error))
        return None

    def _compute(self, step: ScheduledStep) -> EngineOutput:
        started_ns = time.monotonic_ns()
        try:
            result = self._runner.run(step.plan, self._layers_done(step))
        except Exception as error:
            # One bad step must not cost the requests that were not in it.
            logger.exception("a step of %d rows failed", len(step.plan.rows))
            message = f"The engine failed while computing this request: {type(error).__name__}: {error}"
            failures = [
                RequestFailure(request_id, FailureReason.INTERNAL, message)
                for request_id in self._scheduler.fail(step)
            ]
            return EngineOutput(self._scheduler.load(), failures=failures)
        times = StepTimes(started_ns, time.monotonic_ns())
        events = self._scheduler.apply(step, result)
        return EngineOutput(self._scheduler.load(), times, events.tokens, events.pages)

    def _layers_done(self, step: ScheduledStep) -> LayersDone | None:
        """Lets pages leave layer by layer while the step goes on; None where none leave."""
        if not step.plan.num_leaving_blocks:
            return None

        def export(end_layer: int) -> None:
            pages = self._scheduler.export_layers(step, end_layer)
            self._emit(EngineOutput(self._last_load, pages=pages, is_within_step=True))

        return export

    def _report(self, output: EngineOutput) -> None:
        happened = output.tokens or output.pages or output.reserved or output.failures
        if happened or output.load != self._last_load:
            self._last_load = output.load
            self._emit(output)
