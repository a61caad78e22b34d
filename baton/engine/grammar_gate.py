"""Requests with a grammar wait here, off the engine's thread and off the event loop, until it is compiled."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from baton.core.commands import (
    AbortRequest,
    AddRequest,
    EngineCommand,
    FailureReason,
    RequestFailure,
    ReserveBlocks,
)
from baton.core.errors import InvalidRequest
from baton.core.ports import Grammars

Fail = Callable[[RequestFailure], None]


class GrammarGate:
    """Passes commands on to an engine, each request's in their order. Use it on the event loop's thread."""

    def __init__(self, grammars: Grammars, submit: Callable[[EngineCommand], None], fail: Fail) -> None:
        """`fail` hears of requests whose grammar can't be compiled."""
        self._grammars = grammars
        self._submit = submit
        self._fail = fail
        self._waiting: dict[str, list[EngineCommand]] = {}  # by request, its first command first
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, command: EngineCommand) -> None:
        """Pass the command on, now or when its request's grammar is there."""
        match command:
            case AddRequest(request) | ReserveBlocks(request) if request.sampling.grammar:
                self._admit(command)
            case AbortRequest(request_id, choice) if request_id in self._waiting:
                if choice is None:
                    del self._waiting[request_id]  # the engine has not heard of it
                else:
                    self._waiting[request_id].append(command)
            case _:
                self._submit(command)

    def close(self) -> None:
        """Nothing that waits is passed on any more."""
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()

    def _admit(self, command: AddRequest | ReserveBlocks) -> None:
        request = command.request
        if (grammar := self._grammars.known(request.sampling.grammar)) is not None:
            self._submit(replace(command, request=replace(request, grammar=grammar)))
            return
        waiting: list[EngineCommand] = []
        self._waiting[request.request_id] = waiting
        task = asyncio.get_running_loop().create_task(self._compile(command, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compile(self, command: AddRequest | ReserveBlocks, waiting: list[EngineCommand]) -> None:
        request = command.request
        failure, grammar = None, None
        try:
            grammar = await asyncio.to_thread(self._grammars.compile, request.sampling.grammar)
        except InvalidRequest as error:
            failure = RequestFailure(request.request_id, FailureReason.INVALID, str(error))
        except Exception as error:  # a bug, which must not cost the requests of others
            message = f"The grammar can't be compiled: {type(error).__name__}: {error}"
            failure = RequestFailure(request.request_id, FailureReason.INTERNAL, message)
        if self._waiting.get(request.request_id) is not waiting:
            return  # aborted meanwhile
        del self._waiting[request.request_id]
        if failure is not None:
            self._fail(failure)
            return
        self._submit(replace(command, request=replace(request, grammar=grammar)))
        for later in waiting:
            self._submit(later)
