"""The thread that runs the engine: plan, run, apply. The event loop talks to it through two queues.

A runner of depth 2 gets the next step before the one under way is collected, so that planning, preparing
inputs and reporting cost its device nothing.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

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
    ResetPrefixCache,
    StepTimes,
)
from baton.core.errors import InvalidRequest, TransferRefused
from baton.core.page_ports import Mark
from baton.core.ports import LayersDone, Runner, SubmittedStep
from baton.core.scheduler import ScheduledStep, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _LayersQueued:
    step: ScheduledStep
    end_layer: int
    mark: Mark | None


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    step: ScheduledStep
    submitted: SubmittedStep
    submitted_ns: int
    untold: list[_LayersQueued]  # until the step before is collected


class EngineLoop:
    """Owns scheduler and runner from `start` to `stop`; nobody else may touch them meanwhile.

    `emit` is called on the engine's thread with everything that happened: before a step is submitted, if
    commands had answers, when one is collected, and for every group of layers that leave in between.
    `on_crash` is called there if the engine can't go on: what its scheduler holds is not to be trusted any
    more. `mark` makes a mark behind all that the runner has queued on its device; None: layers that it tells
    of are computed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        emit: Callable[[EngineOutput], None],
        on_crash: Callable[[Exception], None],
        mark: Callable[[], Mark] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._emit = emit
        self._on_crash = on_crash
        self._mark = mark
        # Unbounded, but what it holds is not: a command each for requests that the services bound, and one
        # each for aborts and page releases of those.
        self._commands: queue.SimpleQueue[EngineCommand | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._last_load = scheduler.load()
        self._under_way: deque[_StepUnderWay] = deque()
        self._last_end_ns = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: EngineCommand) -> None:
        """Hand a command to the engine; it takes effect before the next step is planned. Any thread."""
        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """Stop after the steps under way; returns whether the thread ended in time."""
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
                self._drain()
                return
            failures = [failure for command in commands if (failure := self._execute(command))]
            reserved = self._scheduler.admit_reservations()
            step = self._scheduler.schedule()
            if reserved or failures or step is None:
                self._report(EngineOutput(self._scheduler.load(), reserved=reserved, failures=failures))
            if step is not None:
                self._submit(step)
            must_wait = step is None and not self._under_way
            if must_wait:
                self._runner.idle()
            elif self._under_way and (step is None or len(self._under_way) == self._runner.depth):
                self._report(self._collect())
                self._tell_layers()

    def _take_commands(self, must_wait: bool) -> list[EngineCommand | None]:
        """Everything that is queued; at least one command if there is nothing to compute."""
        commands = [self._commands.get()] if must_wait else []
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _execute(self, command: EngineCommand | None) -> RequestFailure | None:
        try:
            match command:
                case AddRequest(request, hands_over, export_from):
                    self._scheduler.add(request, hands_over=hands_over, export_from=export_from)
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
                case ResetPrefixCache():
                    self._scheduler.pool.forget_all()
        except InvalidRequest as error:
            assert isinstance(command, AddRequest | ReserveBlocks)
            return RequestFailure(command.request.request_id, FailureReason.INVALID, str(error))
        except TransferRefused as error:
            assert isinstance(command, CommitRequest)
            message = f"The KV transfer failed: {error}."
            return RequestFailure(command.request_id, FailureReason.TRANSFER, message)
        return None

    def _submit(self, step: ScheduledStep) -> None:
        started_ns = time.monotonic_ns()
        untold: list[_LayersQueued] = []
        try:
            submitted = self._runner.submit(step.plan, self._layers_done(step, untold))
        except Exception as error:
            while self._under_way:
                self._report(self._collect())
            self._report(self._fail(error, [step]))
        else:
            self._under_way.append(_StepUnderWay(step, submitted, started_ns, untold))

    def _collect(self) -> EngineOutput:
        """Wait for the first step under way, and take in what it computed."""
        first = self._under_way.popleft()
        try:
            result = first.submitted.collect()
        except Exception as error:
            # The steps after it go on from what it should have computed.
            return self._fail(error, [first.step, *self._drain()])
        # A step that was submitted early began when the one before it ended.
        started_ns, ended_ns = max(first.submitted_ns, self._last_end_ns), time.monotonic_ns()
        self._last_end_ns = ended_ns
        events = self._scheduler.apply(first.step, result)
        failures = [
            RequestFailure(request_id, FailureReason.INVALID, reason)
            for request_id, reason in events.failures.items()
        ]
        return EngineOutput(
            self._scheduler.load(),
            StepTimes(started_ns, ended_ns),
            tokens=events.tokens,
            pages=events.pages,
            failures=failures,
            prompts=events.prompts,
        )

    def _drain(self) -> list[ScheduledStep]:
        """Wait for all steps under way, whatever they give; returns them."""
        steps = []
        while self._under_way:
            last = self._under_way.popleft()
            steps.append(last.step)
            try:
                last.submitted.collect()
            except Exception:
                logger.exception("a step of %d rows failed too", len(last.step.plan.rows))
        return steps

    def _fail(self, error: Exception, steps: list[ScheduledStep]) -> EngineOutput:
        """One bad step must not cost the requests that were not in it."""
        message = f"The engine failed while computing this request: {type(error).__name__}: {error}"
        failures = [
            RequestFailure(request_id, FailureReason.INTERNAL, message)
            for step in steps
            for request_id in self._scheduler.fail(step)
        ]
        logger.error(
            "a step of %d rows failed, and with it %s",
            len(steps[0].plan.rows), ", ".join(failure.request_id for failure in failures), exc_info=error,
        )  # fmt: skip
        return EngineOutput(self._scheduler.load(), failures=failures)

    def _layers_done(self, step: ScheduledStep, untold: list[_LayersQueued]) -> LayersDone | None:
        """Lets pages leave layer by layer while the step goes on; None where none leave.

        The mark is made at once: one made later would lie behind more than these layers. But what the step
        before gives is told first, so that it does not wait for this one's mark.
        """
        if not step.plan.num_leaving_blocks:
            return None

        def layers_done(end_layer: int) -> None:
            layers = _LayersQueued(step, end_layer, self._mark() if self._mark is not None else None)
            if self._under_way:
                untold.append(layers)
            else:
                self._export(layers)

        return layers_done

    def _tell_layers(self) -> None:
        """Of the step that is the first one under way by now."""
        if self._under_way:
            for layers in self._under_way[0].untold:
                self._export(layers)

    def _export(self, layers: _LayersQueued) -> None:
        pages = self._scheduler.export_layers(layers.step, layers.end_layer)
        self._emit(EngineOutput(self._last_load, pages=pages, is_within_step=True, mark=layers.mark))

    def _report(self, output: EngineOutput) -> None:
        happened = output.tokens or output.pages or output.reserved or output.failures or output.prompts
        if happened or output.load != self._last_load:
            self._last_load = output.load
            self._emit(output)
