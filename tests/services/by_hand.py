"""Sessions with a worker made by hand."""

import asyncio
from typing import Any

import grpc

from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.rpc import codec
from baton.v1 import worker_pb2, worker_pb2_grpc
from tests.services.fake_engine import FINGERPRINT
from tests.services.prompts import prompt_of

HELLO = worker_pb2.Command(
    hello=worker_pb2.Hello(protocol_version=codec.PROTOCOL_VERSION, router_id="by hand")
)


def work(number: int, request_id: str, length: int = 9, **sampling: Any) -> worker_pb2.Work:
    prompt, seed = prompt_of(length), chain_seed(FINGERPRINT)
    hashes = tuple(block_hashes(seed, prompt, 4))
    params = SamplingParams(**sampling)
    return codec.work_to_proto(number, EngineRequest(request_id, prompt, seed, hashes, params))


def prefill(number: int, request_id: str, **sampling: Any) -> worker_pb2.Command:
    return worker_pb2.Command(prefill=worker_pb2.Prefill(work=work(number, request_id, **sampling)))


def reserve(number: int, request_id: str) -> worker_pb2.Command:
    return worker_pb2.Command(reserve=worker_pb2.Reserve(work=work(number, request_id)))


async def next_event(call: Any, kind: str) -> worker_pb2.Event:
    """The next event of a kind."""
    while True:
        event = await asyncio.wait_for(call.read(), 5)
        assert event is not grpc.aio.EOF
        if event.WhichOneof("event") == kind:
            return event


async def open_session(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    call = worker_pb2_grpc.WorkerStub(channel).Session()
    await call.write(HELLO)
    await next_event(call, "welcome")
    return call
