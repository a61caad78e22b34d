"""One engine inside an asyncio service: loaded, on its own thread, its output brought to the event loop."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from baton.config import EngineConfig
from baton.core.block_pool import BlockPool
from baton.core.commands import (
    AddRequest,
    EngineCommand,
    EngineOutput,
    FailureReason,
    RequestFailure,
    ReserveBlocks,
)
from baton.core.errors import InvalidRequest, RequestFailed
from baton.core.features import KNOWN_FEATURES, rule_feature
from baton.core.page_ports import PageStore
from baton.core.ports import LoadedEngine
from baton.core.request import LoadSnapshot
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.engine.grammar_gate import GrammarGate
from baton.engine.logits_rules import LogitsRules
from baton.engine.loop import EngineLoop
from baton.engine.pages.device_order import DeviceOrder

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 10.0


class AsyncEngine:
    """The engine of one worker. Make and use it on the event loop's thread."""

    def __init__(self, config: EngineConfig, loaded: LoadedEngine) -> None:
        self.store: PageStore = loaded.page_store
        self.max_model_len = loaded.max_model_len
        self.fingerprint = loaded.fingerprint
        self.scheduler_config = SchedulerConfig(
            block_size=config.block_size,
            max_model_len=loaded.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            vocab_size=loaded.vocab_size,
        )
        scheduler = Scheduler(self.scheduler_config, BlockPool(self.store.num_blocks))
        self.load: LoadSnapshot = scheduler.load()
        self._on_output: Callable[[EngineOutput], None] | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._crash: asyncio.Future[None] | None = None
        self._order: DeviceOrder | None = None
        emit, mark, pages = self._emit, None, self.store.device_pages
        if pages is not None:
            self._order = DeviceOrder(self._emit, self._report_crash)
            emit, mark = self._order.put, pages.mark
        self._engine = EngineLoop(scheduler, loaded.runner, emit, self._report_crash, mark)
        self._rules = LogitsRules.load(config.logits_rules)
        self.features = KNOWN_FEATURES | {rule_feature(name) for name in self._rules.names}
        self._gate = GrammarGate(loaded.grammars, self._engine.submit, self._report_failure)

    def start(self, on_output: Callable[[EngineOutput], None]) -> None:
        """Run; `on_output` is called on this event loop's thread, in order, with all that happens."""
        self._event_loop = asyncio.get_running_loop()
        self._crash = self._event_loop.create_future()
        self._on_output = on_output
        if self._order is not None:
            self._order.start()
        self._engine.start()

    async def watch(self) -> None:
        """Wait for ever; raises RequestFailed if the engine's thread has ended on an error, so that its
        server ends too instead of keeping requests that nobody computes."""
        assert self._crash is not None
        await asyncio.shield(self._crash)

    def submit(self, command: EngineCommand) -> None:
        """Ask the engine for something; it takes effect before its next step."""
        if isinstance(command, AddRequest | ReserveBlocks) and command.request.sampling.logits_rules:
            request = command.request
            try:
                rules = self._rules.of_request(request.sampling.logits_rules)
            except InvalidRequest as error:
                failure = RequestFailure(request.request_id, FailureReason.INVALID, str(error))
                self._report_failure(failure)
                return
            command = replace(command, request=replace(request, rules=rules))
        self._gate.submit(command)

    async def stop(self) -> None:
        """End the thread after the step under way."""
        self._gate.close()
        if not await asyncio.to_thread(self._engine.stop, _STOP_TIMEOUT_S):
            logger.warning("the engine's step did not end within %.0f s", _STOP_TIMEOUT_S)
        elif self._order is not None:
            await asyncio.to_thread(self._order.stop)

    def _emit(self, output: EngineOutput) -> None:
        assert self._event_loop is not None
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(self._receive, output)

    def _report_failure(self, failure: RequestFailure) -> None:
        self._receive(EngineOutput(self.load, failures=[failure]))

    def _report_crash(self, error: Exception) -> None:
        assert self._event_loop is not None
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(self._receive_crash, error)

    def _receive_crash(self, error: Exception) -> None:
        assert self._crash is not None
        if self._crash.done():  # the device and the engine's thread may both have something to say
            return
        self._crash.set_exception(RequestFailed(f"The engine has stopped: {type(error).__name__}: {error}"))
        self._crash.exception()  # retrieved, whether or not somebody watches

    def _receive(self, output: EngineOutput) -> None:
        assert self._on_output is not None
        self.load = output.load
        self._on_output(output)
