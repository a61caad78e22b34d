"""The router's end of a session with one worker: connects, reconnects, and tells requests what came."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from baton.config import worker_name
from baton.core.commands import FailureReason
from baton.core.errors import (
    BatonError,
    InvalidRequest,
    Overloaded,
    RequestFailed,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from baton.core.kv_layout import KVLayout
from baton.rpc import codec
from baton.rpc.auth import credentials
from baton.rpc.limits import CHANNEL_OPTIONS
from baton.v1 import worker_pb2, worker_pb2_grpc
from baton_router.workers.inbox import Inbox
from baton_router.workers.one_model import OneModel
from baton_router.workers.policy import WorkerView

logger = logging.getLogger(__name__)

RECONNECT_DELAY_S = 0.5
WELCOME_TIMEOUT_S = 10.0

_ROLE_NAMES = {
    worker_pb2.ROLE_PREFILL: "prefill",
    worker_pb2.ROLE_DECODE: "decode",
    worker_pb2.ROLE_BOTH: "both",
}

Outbox = asyncio.Queue[worker_pb2.Command | None]  # None: the session is over


@dataclass(slots=True)
class ConnectedWorker:
    """What a worker said of itself, and what this router has asked of it since."""

    worker_id: str
    layout: KVLayout
    max_num_seqs: int
    max_model_len: int
    load: worker_pb2.Load
    features: frozenset[str]
    outbox: Outbox
    is_draining: bool = False
    num_in_flight: int = 0
    num_in_flight_tokens: int = 0


@dataclass(slots=True)
class _Errand:
    inbox: Inbox
    num_choices: int
    num_tokens: int  # of a prompt that is to be computed there
    is_done: bool = False  # but for a report that may still come


class WorkerLink:
    """One worker of the router's list; `worker` is None while it is away."""

    def __init__(
        self, address: str, role: worker_pb2.Role, router_id: str, cluster_token: str, model: OneModel
    ) -> None:
        self.address = address
        self.name = worker_name(address)  # until the worker has said its own
        self.role = role
        self.worker: ConnectedWorker | None = None
        self._router_id = router_id
        self._metadata = credentials(cluster_token)
        self._model = model
        self._errands: dict[int, _Errand] = {}
        self._last_number = 0
        self._last_complaint = ""

    @property
    def role_name(self) -> str:
        """'prefill', 'decode' or 'both'."""
        return _ROLE_NAMES[self.role]

    @property
    def noun(self) -> str:
        """What people are told of it."""
        return "worker of both roles" if self.role == worker_pb2.ROLE_BOTH else f"{self.role_name} server"

    @property
    def is_draining(self) -> bool:
        """Whether the worker ends what it has and takes nothing new."""
        return self.worker is not None and self.worker.is_draining

    def view(self, index: int) -> WorkerView | None:
        """The worker as the policy sees it; None where nothing may be placed on it."""
        worker = self.worker
        if worker is None or worker.is_draining:
            return None
        return WorkerView(
            index=index,
            layout=worker.layout,
            max_num_seqs=worker.max_num_seqs,
            max_model_len=worker.max_model_len,
            load=codec.load_from_proto(worker.load),
            num_in_flight=worker.num_in_flight,
            num_in_flight_tokens=worker.num_in_flight_tokens,
            has_both_roles=self.role == worker_pb2.ROLE_BOTH,
            features=worker.features,
        )

    # --- for requests -------------------------------------------------------------------------------

    def require_worker(self) -> ConnectedWorker:
        """The worker that a request has just been placed on. Raises WorkerLost if it has gone since."""
        if self.worker is None:
            raise WorkerLost(f"The {self.noun} at {self.address} was lost. Try again.")
        return self.worker

    def begin(self, inbox: Inbox, num_choices: int, num_tokens: int) -> int:
        """A number for a new request, whose events go to `inbox` until `end`.

        `num_tokens` is the prompt's length where the worker is to compute it, else 0. Raises WorkerLost if
        the worker has just gone.
        """
        worker = self.require_worker()
        self._last_number += 1
        self._errands[self._last_number] = _Errand(inbox, num_choices, num_tokens)
        worker.num_in_flight += num_choices
        worker.num_in_flight_tokens += num_tokens
        return self._last_number

    def send(self, command: worker_pb2.Command) -> None:
        """Queue a command; one to a worker that has gone is moot, its requests have been told."""
        if self.worker is not None:
            self.worker.outbox.put_nowait(command)

    def prompt_computed(self, number: int) -> None:
        """The request goes on, but its prompt keeps no other one waiting any more."""
        errand = self._errands.get(number)
        if errand is not None and self.worker is not None:
            self.worker.num_in_flight_tokens -= errand.num_tokens
            errand.num_tokens = 0

    def done(self, number: int) -> None:
        """The worker has done its part: nothing but the report of its transfer is waited for."""
        errand = self._errands.get(number)
        if errand is not None and not errand.is_done:
            self._discount(errand)
            errand.is_done = True

    def end(self, number: int) -> None:
        """Nobody reads the request's events any more."""
        errand = self._errands.pop(number, None)
        if errand is not None and not errand.is_done:
            self._discount(errand)

    def _discount(self, errand: _Errand) -> None:
        if self.worker is not None:
            self.worker.num_in_flight -= errand.num_choices
            self.worker.num_in_flight_tokens -= errand.num_tokens

    # --- the session --------------------------------------------------------------------------------

    async def run(self, on_change: asyncio.Event) -> None:
        """Keep a session with the worker for ever; sets `on_change` whenever it comes or goes."""
        logger.info("looking for a %s at %s", self.noun, self.address)
        while True:
            async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
                try:
                    await self._session(channel, on_change)
                except (grpc.aio.AioRpcError, TimeoutError, Unavailable, ValueError) as error:
                    self._complain(error)
            self._lose_worker()
            on_change.set()
            await asyncio.sleep(RECONNECT_DELAY_S)

    async def _session(self, channel: grpc.aio.Channel, on_change: asyncio.Event) -> None:
        # Bounded by the requests under way: each costs at most a start and its aborts.
        outbox: Outbox = asyncio.Queue()
        stub = worker_pb2_grpc.WorkerStub(channel)
        await channel.channel_ready()
        call = stub.Session(self._commands(outbox), metadata=self._metadata)
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                event = await call.read()
            if event is grpc.aio.EOF:
                raise Unavailable("it ended the session at once")
            self.worker = self._admit(event.welcome, outbox)
            self._last_complaint = ""
            logger.info("%s %s connected (%s)", self.noun, self.worker.worker_id, self.address)
            on_change.set()
            while (event := await call.read()) is not grpc.aio.EOF:
                self._dispatch(event, on_change)
        finally:
            call.cancel()
            # grpc's own task reads `_commands`, and goes on where the worker has ended the call.
            outbox.put_nowait(None)

    async def _commands(self, outbox: Outbox) -> AsyncIterator[worker_pb2.Command]:
        hello = worker_pb2.Hello(protocol_version=codec.PROTOCOL_VERSION, router_id=self._router_id)
        yield worker_pb2.Command(hello=hello)
        while (command := await outbox.get()) is not None:
            yield command

    def _admit(self, welcome: worker_pb2.Welcome, outbox: Outbox) -> ConnectedWorker:
        if welcome.role not in (self.role, worker_pb2.ROLE_BOTH):
            raise Unavailable(f"it is no {self.noun}: name it with the option of its role")
        self._model.join(welcome.model_fingerprint)
        self.name = welcome.worker_id or self.name
        return ConnectedWorker(
            worker_id=welcome.worker_id,
            layout=codec.layout_from_proto(welcome.layout),
            max_num_seqs=welcome.max_num_seqs,
            max_model_len=welcome.max_model_len,
            load=welcome.load,
            features=frozenset(welcome.features),
            outbox=outbox,
        )

    def _dispatch(self, event: worker_pb2.Event, on_change: asyncio.Event) -> None:
        assert self.worker is not None
        match event.WhichOneof("event"):
            case "step_output":
                self.worker.load = event.step_output.load
                for number, prompt in codec.prompt_logprobs_from_proto(event.step_output):
                    if errand := self._errands.get(number):
                        errand.inbox.put(prompt)
                for number, token in codec.tokens_from_proto(event.step_output):
                    if errand := self._errands.get(number):
                        errand.inbox.put(token)
            case "reserved":
                if errand := self._errands.get(event.reserved.number):
                    errand.inbox.put(event.reserved.ticket)
            case "failed":
                self._put_error(event.failed.number, _error(event.failed))
            case "transferred":
                if errand := self._errands.get(event.transferred.number):
                    errand.inbox.put(codec.report_from_proto(event.transferred))
            case "draining":
                logger.info("%s %s is draining", self.noun, self.worker.worker_id)
                self.worker.is_draining = True
                on_change.set()

    def _lose_worker(self) -> None:
        if self.worker is None:
            return
        logger.warning(
            "%s %s (%s) was lost with %d requests",
            self.noun,
            self.worker.worker_id,
            self.address,
            sum(not errand.is_done for errand in self._errands.values()),
        )
        self.worker = None
        self._model.leave()
        for number in self._errands:
            message = f"The {self.noun} was lost while it worked on this request. Try again."
            self._put_error(number, WorkerLost(message))
        self._errands.clear()

    def _put_error(self, number: int, error: BatonError) -> None:
        errand = self._errands.get(number)
        if errand is not None and not errand.is_done:
            errand.inbox.put(error)

    def _complain(self, error: Exception) -> None:
        """Log why there is no session, once for as long as the reason stays the same."""
        reason = (
            error.details() or error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
        )
        if self.worker is None and reason != self._last_complaint:
            logger.warning("no session with the %s at %s: %s", self.noun, self.address, reason)
            self._last_complaint = reason


def _error(failed: worker_pb2.Failed) -> BatonError:
    match codec.failure_reason_from_proto(failed):
        case FailureReason.INVALID:
            return InvalidRequest(failed.message)
        case FailureReason.OVERLOADED:
            return Overloaded(failed.message)
        case FailureReason.TRANSFER:  # one of the two servers may have gone; who says so first is chance
            return TransferFailed(f"{failed.message} Try again.")
        case _:
            return RequestFailed(failed.message)
