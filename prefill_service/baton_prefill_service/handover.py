"""From a prompt to its last page, on a prefill server: what is told to whom, and when.

Pure: no I/O, no clock. The service carries its effects out; the simulator in `tests/simulation` does the same
in virtual time.
"""

from dataclasses import dataclass, field
from typing import Protocol

from baton.core.commands import AbortRequest, AddRequest, EngineCommand, FailureReason, ReleasePages
from baton.core.errors import InvalidRequest, TransferRefused
from baton.core.request import EngineRequest, PagesReady, TokenEvent
from baton.core.reservation import FramePlace
from baton.core.ticket import Ticket


class Outgoing(Protocol):
    """One transfer on its way."""

    @property
    def first_block(self) -> int:
        """Of the prompt, in this server's blocks, that decode misses."""
        ...

    def send_pages(self, place: FramePlace, blocks: tuple[int, ...]) -> None:
        """Queue pages that are final."""
        ...

    def commit(self, first_tokens: list[int], finished_choices: list[int]) -> None:
        """The prompt is computed; all pages are queued."""
        ...

    def withdraw(self) -> None:
        """The first tokens ended the request."""
        ...

    def cancel(self) -> None:
        """Nobody wants it any more."""
        ...


class Effects(Protocol):
    """What the handover asks of the world around it."""

    def submit(self, command: EngineCommand) -> None:
        """Give the engine a command."""
        ...

    def begin(self, ticket: Ticket) -> Outgoing:
        """Begin a transfer; how it ends is told by `transfer_ended`. Raises TransferRefused."""
        ...

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the request's router that this worker gives it up."""
        ...

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        ...


@dataclass(slots=True)
class _Prompt:
    """One request under way."""

    num_choices: int
    transfer: Outgoing | None  # None: the first token ends the request, no page moves
    first_tokens: list[int] = field(default_factory=list)  # by choice
    finished_choices: list[int] = field(default_factory=list)


class PrefillHandover:
    """The requests of one prefill server from the router's command to their transfer's end."""

    def __init__(self, num_layers: int, effects: Effects) -> None:
        self._num_layers = num_layers
        self._effects = effects
        self._prompts: dict[str, _Prompt] = {}

    # --- from routers -------------------------------------------------------------------------------

    def prefill(self, request: EngineRequest, ticket: Ticket | None) -> None:
        """Compute the prompt; with a ticket push its pages to the decode server meanwhile.

        Raises InvalidRequest where the decode server can't take this server's pages.
        """
        transfer, export_from = None, None
        if ticket is not None:
            try:
                transfer = self._effects.begin(ticket)
            except TransferRefused as error:
                raise InvalidRequest(str(error)) from None
            export_from = transfer.first_block
        self._prompts[request.request_id] = _Prompt(request.sampling.n, transfer)
        self._effects.submit(AddRequest(request, hands_over=True, export_from=export_from))

    def holds(self, request_id: str) -> bool:
        """Whether the request came here and has not ended."""
        return request_id in self._prompts

    def abort(self, request_id: str, choice: int | None) -> None:
        """Forget a request. One choice alone costs nothing here: its first token is all there is."""
        if choice is None:
            self._effects.submit(AbortRequest(request_id))
            self._drop(request_id)

    # --- from the engine ----------------------------------------------------------------------------

    def token(self, event: TokenEvent) -> None:
        """A first token was sampled."""
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
            self._effects.fail(event.request_id, FailureReason.INVALID, message)
            self._drop(event.request_id)

    def pages(self, pages: PagesReady) -> None:
        """Pages are final, and held for the transfer."""
        prompt = self._prompts.get(pages.request_id)
        if prompt is None or prompt.transfer is None:
            self._release(pages.blocks)  # aborted meanwhile
            return
        end_layer = self._num_layers if pages.end_layer is None else pages.end_layer
        num_layers = end_layer - pages.first_layer
        place = FramePlace(pages.first_block, len(pages.blocks), pages.first_layer, num_layers)
        prompt.transfer.send_pages(place, pages.blocks)
        if pages.is_last:
            prompt.transfer.commit(prompt.first_tokens, prompt.finished_choices)

    def failed(self, request_id: str, reason: FailureReason, message: str) -> None:
        """The engine gave a request up."""
        if request_id in self._prompts:
            self._effects.fail(request_id, reason, message)
            self._drop(request_id)

    # --- from transfers -----------------------------------------------------------------------------

    def transfer_ended(self, request_id: str) -> None:
        """The last frame was acknowledged: the request's work here is done."""
        self._end(request_id)

    def transfer_failed(self, request_id: str, reason: FailureReason, message: str) -> None:
        """The transfer can't be completed."""
        self._effects.submit(AbortRequest(request_id))
        self._effects.fail(request_id, reason, message)
        self._end(request_id)

    def _release(self, blocks: tuple[int, ...]) -> None:
        if blocks:
            self._effects.submit(ReleasePages(blocks))

    def _drop(self, request_id: str) -> None:
        """Forget a request and cut its transfer, which gives its pages back."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is not None and prompt.transfer is not None:
            prompt.transfer.cancel()

    def _end(self, request_id: str) -> None:
        self._prompts.pop(request_id, None)
        self._effects.forget(request_id)
