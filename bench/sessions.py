"""Speaks the router's side of the worker protocol directly, to time what a router would wait for."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.rpc import codec
from baton.rpc.auth import credentials
from baton.rpc.limits import CHANNEL_OPTIONS
from baton.v1 import worker_pb2, worker_pb2_grpc
from bench.workers import Processes

EVENT_TIMEOUT_S = 120.0


class Session:
    """One session with one worker."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[worker_pb2.Command, worker_pb2.Event]") -> None:
        self._call = call
        self.welcome = worker_pb2.Welcome()
        self.load = worker_pb2.Load()  # as the worker last said

    async def hello(self) -> None:
        """Begin."""
        hello = worker_pb2.Hello(protocol_version=codec.PROTOCOL_VERSION, router_id="bench")
        await self.send(worker_pb2.Command(hello=hello))
        self.welcome = (await self.next_event()).welcome

    async def send(self, command: worker_pb2.Command) -> None:
        """Send a command."""
        await self._call.write(command)

    async def next_event(self) -> worker_pb2.Event:
        """The next event. Raises RuntimeError if the worker gives the request up."""
        async with asyncio.timeout(EVENT_TIMEOUT_S):  # Python 3.11's wait_for may lose a cancellation
            event = await self._call.read()
        assert isinstance(event, worker_pb2.Event)
        if event.HasField("step_output"):
            self.load = event.step_output.load
        if event.HasField("failed"):
            raise RuntimeError(event.failed.message)
        return event

    async def output_with(self, number: int, position: int) -> worker_pb2.StepOutput:
        """The step that gave this token of a request."""
        while True:
            output = (await self.next_event()).step_output
            if (number, position) in zip(output.numbers, output.positions, strict=True):
                return output


@dataclass(frozen=True)
class Timeline:
    """One request, in nanoseconds of the machine's monotonic clock."""

    asked: int  # reservation sent
    prefill_asked: int  # ticket there, prefill sent
    first_token: int  # it arrived here
    prefill_ended: int  # the step that ended the prompt
    decode_started: int  # the step that computed the second token
    moved_bytes: int


class Pair:
    """A session each with a prefill and a decode server."""

    def __init__(self, prefill: Session, decode: Session) -> None:
        self.prefill = prefill
        self.decode = decode
        self._numbers = itertools.count(1)

    async def run(self, token_ids: list[int], max_tokens: int = 2) -> Timeline:
        """Take one request through both servers."""
        number = next(self._numbers)
        work = codec.work_to_proto(number, self._request(number, token_ids, max_tokens))
        asked = time.monotonic_ns()
        await self.decode.send(worker_pb2.Command(reserve=worker_pb2.Reserve(work=work)))
        while not (event := await self.decode.next_event()).HasField("reserved"):
            pass
        prefill_asked = time.monotonic_ns()
        prefill = worker_pb2.Prefill(work=work, ticket=event.reserved.ticket)
        await self.prefill.send(worker_pb2.Command(prefill=prefill))
        first = await self.prefill.output_with(number, 0)
        first_token = time.monotonic_ns()
        second = await self.decode.output_with(number, 1)
        ticket = event.reserved.ticket
        layout = codec.layout_from_proto(ticket.layout)
        return Timeline(
            asked=asked,
            prefill_asked=prefill_asked,
            first_token=first_token,
            prefill_ended=first.ended_ns,
            decode_started=second.started_ns,
            moved_bytes=(ticket.num_blocks - ticket.first_block) * layout.bytes_per_block,
        )

    async def transport_load(self, transport: str, num_transfers: int = 1) -> worker_pb2.TransportLoad:
        """What prefill says of a transport, once it says so of at least so many transfers."""
        while True:
            for load in self.prefill.load.transports:
                if load.name == transport and load.num_transfers >= num_transfers:
                    return load
            if num_transfers == 0:
                return worker_pb2.TransportLoad()
            await self.prefill.next_event()

    def _request(self, number: int, token_ids: list[int], max_tokens: int) -> EngineRequest:
        seed = chain_seed(self.decode.welcome.model_fingerprint)
        block_size = self.decode.welcome.layout.block_size
        return EngineRequest(
            request_id=f"bench-{number}",
            prompt_token_ids=tuple(token_ids),
            hash_seed=seed,
            block_hashes=tuple(block_hashes(seed, token_ids, block_size)),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        )


@asynccontextmanager
async def open_pair(processes: Processes) -> AsyncIterator[Pair]:
    """Sessions with both servers."""
    async with (
        open_session(processes.prefill_address, processes.token) as prefill,
        open_session(processes.decode_address, processes.token) as decode,
    ):
        yield Pair(prefill, decode)


@asynccontextmanager
async def open_session(address: str, token: str) -> AsyncIterator[Session]:
    """A session with one worker."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session(metadata=credentials(token))
        session = Session(call)
        await session.hello()
        try:
            yield session
        finally:
            call.cancel()
