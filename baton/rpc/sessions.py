"""The worker's side of sessions: which router asked for what, and where the answers go.

A session is the unit of liveness: when its stream ends, however it ends, every request that came in on it is
aborted on this worker.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc

from baton.core.commands import EngineOutput, FailureReason
from baton.core.errors import InvalidRequest
from baton.core.request import EngineRequest
from baton.rpc import codec
from baton.rpc.first_message import first_message
from baton.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

# A router that stopped reading this many messages ago is as good as gone.
MAX_OUTBOX = 16_384
# Routers queue; this only keeps a broken one from filling the worker's memory.
MAX_REQUESTS = 8_192


class RouterSession:
    """One router's open session: its requests by number, and the events it is to get."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.request_ids: dict[int, str] = {}
        self.overrun = asyncio.Event()  # the router has fallen too far behind
        self._outbox: deque[worker_pb2.Event] = deque()
        self._wake = asyncio.Event()

    def send(self, event: worker_pb2.Event) -> None:
        """Queue an event; a session whose router does not read is broken off."""
        if len(self._outbox) >= MAX_OUTBOX:
            self.overrun.set()
        else:
            self._outbox.append(event)
            self._wake.set()

    async def events(self) -> AsyncIterator[worker_pb2.Event]:
        """Events in order, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._outbox:
                yield self._outbox.popleft()


class RequestHandler(Protocol):
    """What a service does with commands; it answers through `SessionHost`."""

    def reserve(self, request: EngineRequest) -> None:
        """Take pages. Raises InvalidRequest where this worker can't."""
        ...

    def prefill(self, request: EngineRequest, ticket: transfer_pb2.Ticket | None) -> None:
        """Compute a prompt. Raises InvalidRequest where this worker can't."""
        ...

    def run_here(self, request: EngineRequest) -> None:
        """Compute a prompt and go on from it. Raises InvalidRequest where this worker can't."""
        ...

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request, or one choice of it."""
        ...


class SessionHost(worker_pb2_grpc.WorkerServicer):
    """Serves sessions, and knows which session and number each request has."""

    def __init__(
        self,
        welcome: Callable[[], worker_pb2.Welcome],
        block_size: int,
        reset_prefix_cache: Callable[[], None],
    ) -> None:
        self.handler: RequestHandler | None = None
        self._welcome = welcome
        self._block_size = block_size
        self._reset_prefix_cache = reset_prefix_cache
        self._sessions: list[RouterSession] = []
        self._requests: dict[str, tuple[RouterSession, int]] = {}
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # --- what services tell routers -----------------------------------------------------------------

    def holds(self, request_id: str) -> bool:
        """Whether the request has neither ended nor been aborted."""
        return request_id in self._requests

    def send(self, request_id: str, make_event: Callable[[int], worker_pb2.Event]) -> None:
        """Send the request's router an event made from the request's number, if it still wants one."""
        entry = self._requests.get(request_id)
        if entry is not None:
            session, number = entry
            session.send(make_event(number))

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the router that this worker gives the request up, and forget it."""
        self.send(request_id, lambda number: codec.failure_to_proto(number, reason, message))
        self.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        entry = self._requests.pop(request_id, None)
        if entry is not None:
            session, number = entry
            del session.request_ids[number]
        if not self._requests:
            self._idle.set()

    def send_step(self, output: EngineOutput, load: worker_pb2.Load) -> None:
        """One message per session: its requests' tokens of this step, and the worker's load."""
        outputs = [codec.new_step_output(load, output.times) for _ in self._sessions]
        by_session = dict(zip(map(id, self._sessions), outputs, strict=True))
        for event in output.tokens:
            entry = self._requests.get(event.request_id)
            if entry is not None:
                session, number = entry
                codec.add_token(by_session[id(session)], number, event)
        for prompt in output.prompts:
            entry = self._requests.get(prompt.request_id)
            if entry is not None:
                session, number = entry
                codec.add_prompt_logprobs(by_session[id(session)], number, prompt)
        for session, step_output in zip(self._sessions, outputs, strict=True):
            session.send(worker_pb2.Event(step_output=step_output))

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that run; returns whether all ended in time."""
        self._is_draining = True
        for session in self._sessions:
            session.send(worker_pb2.Event(draining=worker_pb2.Draining()))
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # --- what routers tell services -----------------------------------------------------------------

    async def Session(  # noqa: N802 - the name is the proto's
        self,
        request_iterator: AsyncIterator[worker_pb2.Command],
        context: grpc.aio.ServicerContext[worker_pb2.Command, worker_pb2.Event],
    ) -> None:
        """See worker.proto."""
        # A caller that says nothing has no version either.
        hello = (await first_message(aiter(request_iterator)) or worker_pb2.Command()).hello
        if hello.protocol_version != codec.PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker speaks protocol version {codec.PROTOCOL_VERSION}, "
                f"the router {hello.protocol_version}: run the same version of Baton on both",
            )
        session = RouterSession(hello.router_id)
        session.send(worker_pb2.Event(welcome=self._welcome()))
        if self._is_draining:
            session.send(worker_pb2.Event(draining=worker_pb2.Draining()))
        self._sessions.append(session)
        logger.info("router %s connected", session.router_id)
        tasks = [
            asyncio.create_task(self._write(session, context)),
            asyncio.create_task(self._read(session, request_iterator)),
            # The writer can't see it: it waits for the router to read.
            asyncio.create_task(session.overrun.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if session.overrun.is_set():
                logger.warning("router %s does not read its events: session broken off", session.router_id)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()
            self._end(session)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(
        self,
        session: RouterSession,
        context: grpc.aio.ServicerContext[worker_pb2.Command, worker_pb2.Event],
    ) -> None:
        async for event in session.events():
            await context.write(event)

    async def _read(self, session: RouterSession, commands: AsyncIterator[worker_pb2.Command]) -> None:
        async for command in commands:
            match command.WhichOneof("command"):
                case "reserve":
                    self._begin(session, command.reserve.work, None)
                case "prefill":
                    self._begin(session, command.prefill.work, command.prefill)
                case "abort":
                    self._abort(session, command.abort)
                case "reset_prefix_cache":
                    self._reset_prefix_cache()

    def _begin(
        self, session: RouterSession, work: worker_pb2.Work, prefill: worker_pb2.Prefill | None
    ) -> None:
        """Hand a request to the service; without `prefill` it is to be reserved."""
        assert self.handler is not None
        try:
            self._require_room(session, work)
            request = codec.work_from_proto(work, self._block_size)
        except (ValueError, InvalidRequest) as error:
            session.send(codec.failure_to_proto(work.number, FailureReason.INVALID, str(error)))
            return
        except _NoRoom as error:
            session.send(codec.failure_to_proto(work.number, FailureReason.OVERLOADED, str(error)))
            return
        self._requests[request.request_id] = (session, work.number)
        session.request_ids[work.number] = request.request_id
        self._idle.clear()
        try:
            if prefill is None:
                self.handler.reserve(request)
            elif prefill.decodes_here:
                self.handler.run_here(request)
            else:
                self.handler.prefill(request, prefill.ticket if prefill.HasField("ticket") else None)
        except InvalidRequest as error:
            self.fail(request.request_id, FailureReason.INVALID, str(error))

    def _require_room(self, session: RouterSession, work: worker_pb2.Work) -> None:
        if self._is_draining:
            raise _NoRoom("this worker is about to stop")
        if len(self._requests) >= MAX_REQUESTS:
            raise _NoRoom(f"this worker holds {MAX_REQUESTS} requests already")
        if work.request_id in self._requests:
            raise ValueError(f"request id {work.request_id} is in use")
        if work.number in session.request_ids:
            raise ValueError(f"request number {work.number} is in use")

    def _abort(self, session: RouterSession, abort: worker_pb2.Abort) -> None:
        request_id = session.request_ids.get(abort.number)
        if request_id is None:
            return
        assert self.handler is not None
        if abort.HasField("choice"):
            self.handler.abort(request_id, abort.choice)
        else:
            self.forget(request_id)
            self.handler.abort(request_id, None)

    def _end(self, session: RouterSession) -> None:
        """Abort all that hung on a session that is gone."""
        self._sessions.remove(session)
        assert self.handler is not None
        orphans = list(session.request_ids.values())
        for request_id in orphans:
            self.forget(request_id)
            self.handler.abort(request_id, None)
        logger.info("router %s disconnected, %d requests aborted", session.router_id, len(orphans))


class _NoRoom(Exception):
    """The worker takes no more requests now."""
