"""A prefill server: computes prompts and pushes their pages away while it computes."""

import asyncio
import logging
from dataclasses import dataclass, field

from baton.config import WorkerConfig
from baton.core.commands import (
    AbortRequest,
    AddRequest,
    EngineOutput,
    FailureReason,
    ReleasePages,
)
from baton.core.errors import InvalidRequest, TransferRefused
from baton.core.request import EngineRequest, PagesReady, TokenEvent
from baton.engine.host import EngineHost
from baton.rpc import codec
from baton.rpc.sessions import SessionHost
from baton.rpc.worker_server import make_session_host, new_epoch
from baton.v1 import transfer_pb2, worker_pb2
from kv_transfer.grpc_sender import GrpcSender, OutgoingTransfer
from kv_transfer.stats import TransferStats

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prompt:
    """One request under way."""

    num_choices: int
    transfer: OutgoingTransfer | None  # None: the first token ends the request, no page moves
    task: asyncio.Task[None] | None
    first_tokens: list[int] = field(default_factory=list)  # by choice
    finished_choices: list[int] = field(default_factory=list)


class PrefillService:
    """Joins sessions, the engine and outgoing transfers; all of it on the event loop's thread."""

    def __init__(self, config: WorkerConfig, engine: EngineHost, tasks: asyncio.TaskGroup) -> None:
        self._engine = engine
        self._tasks = tasks
        self._stats = TransferStats()
        self._prompts: dict[str, _Prompt] = {}
        self.sender = GrpcSender(engine.store, config.cluster_token, self._stats)
        self.sessions: SessionHost = make_session_host(
            config,
            new_epoch(),
            engine.scheduler_config,
            engine.store.layout,
            engine.fingerprint,
            self._load,
        )
        self.sessions.handler = self

    # --- from routers -------------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> None:
        """Not this server's work."""
        raise InvalidRequest("this is a prefill server: reserve pages on a decode server")

    def prefill(
        self, request: EngineRequest, ticket: transfer_pb2.Ticket | None, first_tokens: dict[int, int]
    ) -> None:
        """Compute the prompt; with a ticket push its pages to the decode server meanwhile.

        `first_tokens`, by choice, are committed whatever is sampled; whether one ends its choice follows
        from itself, so that a retry finds the same choices finished as the try that told the client.
        Raises InvalidRequest where the decode server's page layout is not this server's.
        """
        transfer, task, export_from = None, None, None
        if ticket is not None:
            try:
                transfer = self.sender.begin(codec.ticket_from_proto(ticket), self._release)
            except TransferRefused as error:
                raise InvalidRequest(str(error)) from None
            task = self._tasks.create_task(self._push(request.request_id, transfer))
            export_from = ticket.first_block
        self._prompts[request.request_id] = _Prompt(request.sampling.n, transfer, task)
        self._engine.submit(
            AddRequest(request, hands_over=True, export_from=export_from, told_first_tokens=first_tokens)
        )

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request. One choice alone costs nothing here: its first token is all there is."""
        if choice is None:
            self._engine.submit(AbortRequest(request_id))
            self._drop(request_id)

    # --- from the engine ----------------------------------------------------------------------------

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        self.sessions.send_step(output, self._load())
        for event in output.tokens:
            self._note_token(event)
        for pages in output.pages:
            self._send_pages(pages)
        for failure in output.failures:
            self.sessions.fail(failure.request_id, failure.reason, failure.message)
            self._drop(failure.request_id)

    def _note_token(self, event: TokenEvent) -> None:
        prompt = self._prompts.get(event.request_id)
        if prompt is None:
            return
        prompt.first_tokens.append(event.token.token_id)
        if event.finish_reason is not None:
            prompt.finished_choices.append(event.choice)
        if len(prompt.finished_choices) == prompt.num_choices:
            if prompt.transfer is None:
                self._end(event.request_id)
            else:
                prompt.transfer.withdraw()
        elif prompt.transfer is None and len(prompt.first_tokens) == prompt.num_choices:
            message = "The request goes on after its first token, but came without a ticket for its pages."
            self.sessions.fail(event.request_id, FailureReason.INVALID, message)
            self._drop(event.request_id)

    def _send_pages(self, pages: PagesReady) -> None:
        prompt = self._prompts.get(pages.request_id)
        if prompt is None or prompt.transfer is None:
            self._release(pages.blocks)  # aborted meanwhile
            return
        prompt.transfer.send_pages(pages.first_block, pages.blocks)
        if pages.is_last:
            prompt.transfer.commit(prompt.first_tokens, prompt.finished_choices)

    # --- transfers ----------------------------------------------------------------------------------

    async def _push(self, request_id: str, transfer: OutgoingTransfer) -> None:
        """Owns one transfer from its first page to its end."""
        try:
            await transfer.run()
        except TransferRefused as error:
            logger.warning("transfer of %s failed: %s", request_id, error)
            self._engine.submit(AbortRequest(request_id))
            self.sessions.fail(request_id, FailureReason.TRANSFER, f"The KV transfer failed: {error}.")
        except Exception as error:  # a bug, which must not cost the requests of others
            logger.exception("transfer of %s failed", request_id)
            self._engine.submit(AbortRequest(request_id))
            self.sessions.fail(request_id, FailureReason.INTERNAL, f"The KV transfer failed: {error!r}.")
        self._end(request_id)
        # No step may come for a while: the routers' metrics are to show how the transfer ended now.
        self.sessions.send_step(EngineOutput(self._engine.load), self._load())

    def _release(self, blocks: tuple[int, ...]) -> None:
        if blocks:
            self._engine.submit(ReleasePages(blocks))

    def _drop(self, request_id: str) -> None:
        """Forget a request and cut its transfer, which gives its pages back."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None and prompt.task is not None:
            prompt.task.cancel()

    def _end(self, request_id: str) -> None:
        """The request's work here is done."""
        self._prompts.pop(request_id, None)
        self.sessions.forget(request_id)

    def _load(self) -> worker_pb2.Load:
        return codec.load_to_proto(self._engine.load, self._stats.num_bytes, self._stats.outcomes)
