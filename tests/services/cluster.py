"""Workers of every role on real gRPC servers in this event loop, and a router's back in front."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.config import EngineConfig, Role, RouterConfig, WorkerConfig
from baton.core.commands import EngineOutput
from baton.core.kv_layout import KVLayout
from baton.core.reservation import TransferDeadlines
from baton.core.sampling import SamplingParams
from baton.core.stopping import FinishReason
from baton.engine.async_engine import AsyncEngine
from baton.rpc import worker_server
from baton.rpc.server import RpcServer
from baton.v1 import worker_pb2_grpc
from baton_both_service.service import BothService
from baton_decode_service.service import DecodeService
from baton_prefill_service.service import PrefillService
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.metrics import FrontMetrics
from baton_router.requests.admission import Admission
from baton_router.requests.worker_backend import WorkerBackend
from baton_router.workers import worker_link
from baton_router.workers.pool import WorkerPool
from tests.services.fake_engine import CONFIG_DIGEST, FINGERPRINT, FakeEngine, fake_layout, load_fake_engine

DEADLINE_S = 10.0


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for something that is to become true soon."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"did not happen within {DEADLINE_S:.0f} s: {what or condition}"
        await asyncio.sleep(0.002)


@dataclass(frozen=True)
class Limits:
    """What one worker may use."""

    layout: KVLayout = field(default_factory=fake_layout)
    num_blocks: int = 256
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 16
    max_model_len: int = 512
    fingerprint: bytes = FINGERPRINT
    deadlines: TransferDeadlines = field(default_factory=TransferDeadlines)
    kv_transport: str = "grpc"
    on_device: Callable[[FakeEngine], FakeEngine] | None = None  # puts the engine's pages on a device


class Worker:
    """One server that can be stopped and started again on its address, as a new process would be."""

    def __init__(self, role: Role, address: str, limits: Limits, cluster_token: str = "") -> None:
        self.limits = limits
        self.address = address
        config = EngineConfig(
            block_size=limits.layout.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self.config = WorkerConfig(
            role,
            Path("/nowhere"),
            address,
            address,
            f"{role}-0",
            cluster_token,
            config,
            kv_transport=limits.kv_transport,
            transfer_deadlines=limits.deadlines,
        )
        self.engine: FakeEngine
        self.host: AsyncEngine
        self.service: Any = None  # PrefillService, DecodeService or BothService
        self.prefill_role: PrefillService | None = None
        self.decode_role: DecodeService | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """A new epoch: pages and requests of the last one are gone."""
        limits = self.limits
        self.engine = load_fake_engine(
            limits.layout, limits.num_blocks, limits.max_model_len, limits.fingerprint
        )
        if limits.on_device is not None:
            self.engine = limits.on_device(self.engine)
        self.host = AsyncEngine(self.config.engine, self.engine)
        self._stopping = asyncio.Event()
        started = asyncio.Event()
        self._task = asyncio.create_task(self._serve(started))
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait((waiting, self._task), return_when=asyncio.FIRST_COMPLETED)
        assert started.is_set(), self._task

    async def stop(self) -> None:
        """End at once, as a killed process would for all who are connected to it."""
        if self._task is not None:
            self.engine.runner.gate.set()
            self._stopping.set()
            task, self._task = self._task, None
            await task
            self.host._engine._scheduler.pool.check_integrity()

    def hold(self) -> None:
        """Let its next step wait."""
        self.engine.runner.gate.clear()

    async def is_held(self) -> None:
        """Wait until a step waits."""
        await until(self.engine.runner.is_held.is_set, "a step at the gate")

    def let_go(self) -> None:
        """Let it run."""
        self.engine.runner.gate.set()

    def record_choices(self) -> set[int]:
        """The choices that this worker computes tokens of from now on."""
        computed: set[int] = set()
        receive = self.host._on_output
        assert receive is not None

        def note_choices(output: EngineOutput) -> None:
            computed.update(event.choice for event in output.tokens)
            receive(output)

        self.host._on_output = note_choices
        return computed

    async def _serve(self, started: asyncio.Event) -> None:
        server = RpcServer(self.config.cluster_token)
        names = ["baton.v1.Worker"]
        worker = worker_server.Worker(self.config, self.host)
        async with asyncio.TaskGroup() as tasks:
            self.service = self._make_service(worker, tasks)
            worker.sessions.handler = self.service
            if self.decode_role is not None:
                self.decode_role.receiver.add_to(server.grpc)
                names.append("baton.v1.Transfer")
            worker_pb2_grpc.add_WorkerServicer_to_server(worker.sessions, server.grpc)
            self.host.start(self.service.on_output)
            watcher = tasks.create_task(self.host.watch())
            await server.start(self.address, names, "--listen")
            started.set()
            try:
                await self._stopping.wait()
            finally:
                await server.grpc.stop(0)
                watcher.cancel()
                await self.host.stop()
                if self.prefill_role is not None:
                    await self.prefill_role.sender.close()
                if self.decode_role is not None:
                    await self.decode_role.transports.close()

    def _make_service(self, worker: worker_server.Worker, tasks: asyncio.TaskGroup) -> Any:
        self.sessions, self.stats = worker.sessions, worker.stats
        if self.config.role == "both":
            both = BothService(self.config, self.host, worker, tasks)
            self.prefill_role, self.decode_role = both.prefill_role, both.decode_role
            return both
        if self.config.role == "prefill":
            self.prefill_role = PrefillService(self.config, self.host, worker, tasks)
            return self.prefill_role
        self.decode_role = DecodeService(self.config, self.host, worker, tasks)
        return self.decode_role

    @property
    def leftovers(self) -> dict[str, object]:
        """What is not as it was before the first request."""
        load, sessions = self.host.load, self.sessions
        found: dict[str, Any] = {
            "pages": load.num_blocks - load.num_free_blocks,
            "running": load.num_running,
            "waiting": load.num_waiting,
            "reserved": load.num_reserved,
            "_requests": sessions._requests,
            "request_ids": [ids for session in sessions._sessions for ids in session.request_ids],
        }
        if self.prefill_role is not None:
            found["_prompts"] = self.prefill_role._handover._prompts
        if self.decode_role is not None:
            handover = self.decode_role._handover
            names = ("table", "_num_tokens", "_open_choices", "_cut_choices")
            found |= {name: getattr(handover, name) for name in names}
            found |= {"inbound": handover.inbound._open, "writers": handover.inbound._writers}
        return {
            name: value
            for name, value in found.items()
            if (len(value) if hasattr(value, "__len__") else value)
        }


@dataclass
class Answer:
    """All that a request has said."""

    tokens: list[list[int]]
    reasons: list[FinishReason | None]
    num_cached: int = 0

    @property
    def outcomes(self) -> list[tuple[list[int], FinishReason | None]]:
        """Comparable with `expected`."""
        return list(zip(self.tokens, self.reasons, strict=True))

    def add(self, delta: TokenDelta) -> None:
        """Append what has come; nothing may come after the end."""
        assert self.reasons[delta.choice] is None
        self.tokens[delta.choice] += [token.token_id for token in delta.tokens]
        self.reasons[delta.choice] = delta.finish_reason
        self.num_cached += delta.num_cached_prompt_tokens


class Cluster:
    """The workers, and a router's back without its front doors."""

    def __init__(
        self,
        prefills: list[Worker],
        decodes: list[Worker],
        boths: list[Worker],
        max_queue: int,
        cluster_token: str,
        directory: Path,
        swapped: bool,
    ) -> None:
        self.prefills, self.decodes, self.boths = prefills, decodes, boths
        of_prefill, of_decode = [
            tuple(worker.address for worker in workers) for workers in (prefills, decodes)
        ]
        if swapped:
            of_prefill, of_decode = of_decode, of_prefill
        self._config = RouterConfig(
            directory,
            ("fake",),
            of_prefill,
            of_decode,
            worker_addresses=tuple(worker.address for worker in boths),
            max_queue=max_queue,
            cluster_token=cluster_token,
        )
        self.max_queue = max_queue
        self._num_requests = 0
        self._sessions: asyncio.Task[None] | None = None

    async def start_router(self) -> None:
        """A new router on the same workers."""
        self.pool = WorkerPool(self._config, CONFIG_DIGEST)
        pool = self.pool
        self.admission = Admission(self.max_queue, lambda: pool.capacity)
        self.metrics = FrontMetrics(CollectorRegistry())
        self.backend = WorkerBackend(self.pool, self.admission, 512, self.metrics)
        self._sessions = asyncio.create_task(self.pool.run(self.admission.update))

    async def stop_router(self) -> None:
        """As if its process had ended."""
        assert self._sessions is not None
        self._sessions.cancel()
        await asyncio.wait((self._sessions,))
        assert self._sessions.cancelled(), self._sessions.exception()

    @property
    def prefill(self) -> Worker:
        return self.prefills[0]

    @property
    def decode(self) -> Worker:
        return self.decodes[0]

    @property
    def both(self) -> Worker:
        return self.boths[0]

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefills, *self.decodes, *self.boths]

    @property
    def links(self) -> list[worker_link.WorkerLink]:
        return self.pool.links

    async def connected(self) -> None:
        """Wait for a session with every worker."""
        await until(lambda: all(link.worker for link in self.links), "sessions with all workers")

    def request(self, prompt: tuple[int, ...], *, priority: int = 0, salt: str = "", **sampling: Any) -> Any:
        """A request under a new id."""
        self._num_requests += 1
        params = SamplingParams(**{"max_tokens": 8, **sampling})
        return GenerationRequest(f"request-{self._num_requests}", prompt, params, priority, salt)

    async def ask(self, request: GenerationRequest) -> Answer:
        """Run a request to its end."""
        answer = Answer([[] for _ in range(request.sampling.n)], [None] * request.sampling.n)
        async with aclosing(self.backend.generate(request)) as deltas:
            async for delta in deltas:
                answer.add(delta)
        return answer

    async def all_clean(self) -> None:
        """Wait until nothing is left of any request, anywhere."""

        def leftovers() -> dict[str, object]:
            found: dict[str, Any] = {worker.address[-6:]: worker.leftovers for worker in self.workers}
            found["router"] = [
                *self.backend._flights,
                *self.admission._waiters,
                *[errand for link in self.links for errand in link._errands],
                *[link for link in self.links if _in_flight(link) > 0],
            ]
            found["slots"] = self.admission._num_slots_taken
            return {name: value for name, value in found.items() if value}

        try:
            await until(lambda: not leftovers())
        except AssertionError:
            pytest.fail(f"left over: {leftovers()}")


def _in_flight(link: worker_link.WorkerLink) -> int:
    return link.worker.num_in_flight + link.worker.num_in_flight_tokens if link.worker else 0


@asynccontextmanager
async def cluster(
    prefill: Limits | None = None,
    decode: Limits | None = None,
    both: Limits | None = None,
    *,
    num_prefills: int = 1,
    num_decodes: int = 1,
    num_boths: int = 0,
    max_queue: int = 64,
    cluster_token: str = "",
    start: bool = True,
    swapped: bool = False,
) -> AsyncIterator[Cluster]:
    """A running cluster; fails where the event loop had to report something that nobody handled."""
    unhandled: list[dict[str, Any]] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # grpc's poller may still look after the closed loop of the test before this one.
        if "PollerCompletionQueue" not in context["message"]:
            unhandled.append(context)

    asyncio.get_running_loop().set_exception_handler(note)
    with tempfile.TemporaryDirectory(prefix="baton-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_link, "RECONNECT_DELAY_S", 0.02)
        limits = {"prefill": prefill or Limits(), "decode": decode or Limits(), "both": both or Limits()}
        prefills, decodes, boths = (
            [
                Worker(role, f"unix:{directory}/{role[0]}{index}", limits[role], cluster_token)  # type: ignore[arg-type]
                for index in range(count)
            ]
            for role, count in (("prefill", num_prefills), ("decode", num_decodes), ("both", num_boths))
        )
        made = Cluster(prefills, decodes, boths, max_queue, cluster_token, Path(directory), swapped)
        try:
            if start:
                await asyncio.gather(*(worker.start() for worker in made.workers))
            await made.start_router()
            if start:
                await made.connected()
            yield made
        finally:
            await made.stop_router()
            await asyncio.gather(*(worker.stop() for worker in made.workers))
    assert not unhandled, unhandled
