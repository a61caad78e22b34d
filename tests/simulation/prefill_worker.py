"""A prefill server in virtual time: what PrefillService does around the real handover."""

from typing import TYPE_CHECKING

from baton.core.commands import EngineCommand, EngineOutput, FailureReason, ReleasePages
from baton.core.errors import InvalidRequest
from baton.core.request import EngineRequest
from baton.core.ticket import Ticket
from baton_prefill_service.handover import PrefillHandover
from tests.simulation.engine import VirtualEngine
from tests.simulation.pages import NUM_LAYERS, PrefillPages
from tests.simulation.push import VirtualPush
from tests.simulation.schedule import Violation
from tests.simulation.sessions import Session, SessionHost

if TYPE_CHECKING:
    from tests.simulation.world import World


class VirtualPrefill:
    """One incarnation of the prefill server."""

    def __init__(self, world: "World") -> None:
        self.pages = PrefillPages(world.prefill_block_size, world.num_prefill_blocks)
        self.engine = VirtualEngine(
            world, "prefill", self.pages, world.prefill_budget, world.prefill_step_time, self._on_output
        )
        self.handover = PrefillHandover(NUM_LAYERS, self)
        self.sessions = SessionHost()
        self.is_dead = False
        self.pushes: list[VirtualPush] = []  # that have not ended
        self._world = world

    def die(self, number: int) -> None:
        """All state is lost; its calls break."""
        self.is_dead = self.engine.is_dead = True
        for push in self.pushes:
            push.die(number)

    # --- from routers -------------------------------------------------------------------------------

    def prefill_prompt(self, session: Session, request: EngineRequest, ticket: Ticket | None) -> None:
        """See SessionHost."""
        self.sessions.begin(request.request_id, session)
        try:
            self.handover.prefill(request, ticket)
        except InvalidRequest:
            self.fail(request.request_id, FailureReason.INVALID, "")

    def abort(self, session: Session, request_id: str, choice: int | None) -> None:
        """See SessionHost."""
        if self.sessions.requests.get(request_id) is not session:
            return
        self._world.log(f"prefill: abort of {request_id}{'' if choice is None else f', choice {choice}'}")
        if choice is None:
            self.sessions.forget(request_id)
        self.handover.abort(request_id, choice)

    def session_ended(self, session: Session) -> None:
        """See SessionHost."""
        for request_id in self.sessions.orphans_of(session):
            self.sessions.forget(request_id)
            self.handover.abort(request_id, None)

    # --- from the engine ----------------------------------------------------------------------------

    def _on_output(self, output: EngineOutput) -> None:
        if not output.is_within_step:
            self._world.send_tokens(self.sessions, output.tokens)
        for event in output.tokens:
            self.handover.token(event)
        for pages in output.pages:
            self.handover.pages(pages)
        for failure in output.failures:
            self.handover.failed(failure.request_id, failure.reason, failure.message)

    # --- effects of the handover ----------------------------------------------------------------------

    def submit(self, command: EngineCommand) -> None:
        """Give the engine a command."""
        self.engine.submit(command)

    def begin(self, ticket: Ticket) -> VirtualPush:
        """Begin a transfer. Raises TransferRefused."""
        push = VirtualPush(self._world, self, ticket)
        self.pushes.append(push)
        return push

    def fail(self, request_id: str, reason: FailureReason, message: str) -> None:
        """Tell the request's router that this worker gives it up."""
        self._world.log(f"prefill: gives up {request_id}: {reason.value} {message}")
        self._world.send_failure(self.sessions, request_id, reason)
        self.sessions.forget(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended here."""
        self.sessions.forget(request_id)

    def release(self, blocks: tuple[int, ...]) -> None:
        """A transfer has read pages."""
        if blocks:
            self.submit(ReleasePages(blocks))

    def check_idle(self) -> None:
        """All has ended: nothing is left of it."""
        left = {
            "requests": list(self.sessions.requests),
            "prompts": self.handover._prompts,
            "pushes": [push.name for push in self.pushes],
        }
        if any(left.values()):
            raise Violation(
                f"prefill keeps {[f'{what}: {kept}' for what, kept in left.items() if kept]} in the end"
            )
        self.engine.check_idle()
