"""One request through the workers: reserve on decode, prefill, tokens from both in one order."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.core.errors import BatonError, RequestFailed
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest, TokenEvent
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton.rpc import codec
from baton.v1 import transfer_pb2, worker_pb2
from router.admission import Admission
from router.generation import GenerationRequest, TokenDelta
from router.inbox import Inbox
from router.pool import WorkerPool
from router.worker_link import WorkerLink

# Longer prompts are hashed on a thread: a million tokens take about a tenth of a second.
_HASH_ON_LOOP_TOKENS = 16_384
# No step of any model takes this long; a prompt's last chunk comes sooner.
SILENCE_TIMEOUT_S = 600.0


class WorkerBackend:
    """The workers behind the front doors; see router.generation.Backend."""

    def __init__(
        self, pool: WorkerPool, admission: Admission, fingerprint: bytes, max_model_len: int
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._fingerprint = fingerprint
        self._max_model_len = max_model_len
        self._flights: dict[str, Flight] = {}

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request that every worker takes; the model's own length while there are none."""
        return min(self._max_model_len, self._pool.max_model_len or self._max_model_len)

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now has workers to run on."""
        return self._pool.is_ready

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
        """See router.generation.Backend."""
        self._pool.place()  # without workers nothing waits in the queue
        num_slots = request.sampling.n
        await self._admission.enter(num_slots, request.priority)
        try:
            prefill, decode = self._pool.place()
            assert decode.worker is not None
            engine_request = await self._engine_request(request, decode.worker.layout.block_size)
            flight = Flight(engine_request, prefill, decode)
            self._flights[request.request_id] = flight
            async with aclosing(flight.run()) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self._flights.pop(request.request_id, None)
            self._admission.leave(num_slots)

    def abort_choice(self, request_id: str, choice: int) -> None:
        """See router.generation.Backend."""
        flight = self._flights.get(request_id)
        if flight is not None:
            flight.abort_choice(choice)

    async def _engine_request(self, request: GenerationRequest, block_size: int) -> EngineRequest:
        seed = chain_seed(self._fingerprint, request.cache_salt)
        if len(request.token_ids) > _HASH_ON_LOOP_TOKENS:
            hashes = await asyncio.to_thread(block_hashes, seed, request.token_ids, block_size)
        else:
            hashes = block_hashes(seed, request.token_ids, block_size)
        return EngineRequest(
            request_id=request.request_id,
            prompt_token_ids=request.token_ids,
            hash_seed=seed,
            block_hashes=tuple(hashes),
            sampling=request.sampling,
            priority=request.priority,
        )


class _Choice:
    """Tokens of one choice, brought into order: decode's second may overtake prefill's first."""

    def __init__(self) -> None:
        self.is_open = True  # the front door wants more of it
        self.has_finished = False  # a worker has ended it
        self._next_position = 0
        self._early: dict[int, TokenEvent] = {}

    def add(self, event: TokenEvent) -> None:
        """Take a token in, in whatever order."""
        self._early[event.position] = event

    def take_ready(self) -> list[TokenEvent]:
        """The tokens that are next in order."""
        ready: list[TokenEvent] = []
        while (event := self._early.pop(self._next_position, None)) is not None:
            ready.append(event)
            self._next_position += 1
        return ready


class Flight:
    """One request on its two workers, from the reservation to the last token."""

    def __init__(self, request: EngineRequest, prefill: WorkerLink, decode: WorkerLink) -> None:
        self._request = request
        self._prefill = prefill
        self._decode = decode
        self._inbox = Inbox()
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._num_first_tokens_missing = request.sampling.n
        self._decode_has_begun = False
        self._numbers: dict[WorkerLink, int] = {}
        self._ticket: transfer_pb2.Ticket | None = None
        self._error: BatonError | None = None

    async def run(self) -> AsyncGenerator[TokenDelta]:
        """Stream the tokens; closing it aborts the request on both workers."""
        try:
            # Before the reservation, so that prompts that come meanwhile see this one's load.
            self._begin(self._prefill)
            if self._request.sampling.max_tokens > 1:
                await self._reserve()
            if self._is_open:
                self._start_prefill()
            while self._is_open:
                await self._take_all()
                for delta in self._deltas():
                    yield delta
                if self._error is not None and self._is_open:  # what has finished stays finished
                    raise self._error
        finally:
            self._leave()

    def abort_choice(self, choice: int) -> None:
        """Nobody wants more of this choice; without the last one the whole request is left."""
        self._choices[choice].is_open = False
        if self._is_open:
            for link, number in self._numbers.items():
                abort = worker_pb2.Abort(number=number, choice=choice)
                link.send(worker_pb2.Command(abort=abort))
        self._inbox.wake()

    @property
    def _is_open(self) -> bool:
        return any(choice.is_open for choice in self._choices)

    async def _reserve(self) -> None:
        """Wait for the ticket, or until nobody wants any choice any more."""
        self._begin(self._decode)
        work = codec.work_to_proto(self._numbers[self._decode], self._request)
        self._decode.send(worker_pb2.Command(reserve=worker_pb2.Reserve(work=work)))
        while self._ticket is None and self._is_open:
            await self._take_all()
            if self._error is not None:
                raise self._error

    def _start_prefill(self) -> None:
        work = codec.work_to_proto(self._numbers[self._prefill], self._request)
        prefill = worker_pb2.Prefill(work=work, ticket=self._ticket)
        self._prefill.send(worker_pb2.Command(prefill=prefill))

    def _begin(self, link: WorkerLink) -> None:
        self._numbers[link] = link.begin(self._inbox, len(self._choices), len(self._request.prompt_token_ids))

    async def _take_all(self) -> None:
        for item in await self._inbox.take_all(SILENCE_TIMEOUT_S):
            match item:
                case TokenEvent():
                    self._take_token(item)
                case transfer_pb2.Ticket():
                    self._ticket = item
                case BatonError():
                    self._error = self._error or item

    def _take_token(self, event: TokenEvent) -> None:
        if event.choice >= len(self._choices):
            raise RequestFailed(f"A worker sent a token of choice {event.choice}, which was not asked for.")
        self._choices[event.choice].add(event)
        if event.position == 0:
            self._num_first_tokens_missing -= 1
        else:
            self._decode_has_begun = True
        if self._decode_has_begun and not self._num_first_tokens_missing:
            # The pages have arrived: what becomes of the prefill server now is nothing to this request.
            self._prefill.end(self._numbers[self._prefill])

    def _deltas(self) -> list[TokenDelta]:
        deltas = []
        for index, choice in enumerate(self._choices):
            if choice.is_open and (events := choice.take_ready()):
                delta = _delta(index, events)
                choice.has_finished = delta.finish_reason is not None
                choice.is_open = not choice.has_finished
                deltas.append(delta)
        return deltas

    def _leave(self) -> None:
        """Abort a request that the workers have not ended themselves."""
        has_finished = all(choice.has_finished for choice in self._choices)
        for link, number in self._numbers.items():
            if not has_finished:
                link.send(worker_pb2.Command(abort=worker_pb2.Abort(number=number)))
            link.end(number)


def _delta(choice: int, events: list[TokenEvent]) -> TokenDelta:
    tokens: tuple[SampledToken, ...] = tuple(event.token for event in events)
    reason: FinishReason | None = events[-1].finish_reason
    return TokenDelta(choice, tokens, reason, events[0].num_cached_prompt_tokens)
