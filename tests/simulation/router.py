"""The router in virtual time: what Flight, Attempt and WorkerLink do, and what each client gets."""

from typing import TYPE_CHECKING

from baton.core.commands import FailureReason
from baton.core.request import TokenEvent
from baton.rpc.ticket import Ticket
from tests.simulation.cases import Case
from tests.simulation.schedule import Violation
from tests.simulation.sessions import Session

if TYPE_CHECKING:
    from tests.simulation.world import World

MAX_ATTEMPTS = 3
RECONNECT_DELAY_S = 0.5
_LOST = "worker lost"


class Router:
    """Sessions with both workers, and the attempts that listen to them."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.prefill: Session | None = None
        self.decode: Session | None = None
        self.attempts: dict[str, Attempt] = {}  # by request id, until they are left
        self.waiting: list[Flight] = []  # whose clients try again when both workers are there

    def connect(self) -> None:
        """Open the sessions that are missing."""
        world = self._world
        if self.prefill is None:
            self.prefill = Session(world, world.prefill, self._lost)
        if self.decode is None:
            self.decode = Session(world, world.decode, self._lost)
        waiting, self.waiting = self.waiting, []
        for flight in waiting:
            flight.begin()

    def _lost(self, session: Session) -> None:
        if session is self.prefill:
            self.prefill = None
        elif session is self.decode:
            self.decode = None
        self._world.after(RECONNECT_DELAY_S, self.connect)
        for attempt in list(self.attempts.values()):
            attempt.flight.take_error(session, attempt, _LOST)


class Attempt:
    """One try of a request on its workers (router.attempt.Attempt)."""

    def __init__(self, flight: "Flight", request_id: str, prefill: Session, decode: Session) -> None:
        self.flight = flight
        self.request_id = request_id
        self.prefill = prefill
        self.decode = decode
        self.decode_has_begun = False
        self.is_local = flight.case.is_local  # decode does it all
        self._errors: list[str] = []
        self._is_handed_over = False
        self._sessions = [] if self.is_local else [prefill]

    @property
    def error(self) -> str | None:
        """What ended the attempt, if anything did."""
        for error in self._errors:
            if not (self._is_handed_over and error == FailureReason.TRANSFER.value):
                return error
        return None

    def hears(self, session: Session) -> bool:
        """Whether it matters to the attempt what comes over a session, or that it is lost."""
        return session in self._sessions and not (self._is_handed_over and session is self.prefill)

    def start(self, first_tokens: dict[int, int], closed_choices: list[int]) -> None:
        """Ask decode for pages, or prefill for the only token, or decode for everything."""
        case = self.flight.case
        if case.sampling.max_tokens == 1:
            self.compute(None, {})
            return
        self._sessions.append(self.decode)
        decode = self.decode.worker
        request = case.request(self.request_id, decode.pages.layout.block_size)
        if self.is_local:
            self.decode.command(decode.run_here, request, first_tokens)
        else:
            self.decode.command(decode.reserve, request)
        for choice in closed_choices:
            self.abort_choice(choice)

    def compute(self, ticket: Ticket | None, first_tokens: dict[int, int]) -> None:
        """Let the prompt be computed."""
        prefill = self.prefill.worker
        request = self.flight.case.request(self.request_id, prefill.pages.layout.block_size)
        self.prefill.command(prefill.prefill_prompt, request, ticket, first_tokens)

    def hand_over(self) -> None:
        """The pages have arrived: what becomes of the prefill server now is nothing to this request."""
        self._is_handed_over = True

    def fail(self, error: str) -> None:
        """A worker has given up, or has gone."""
        self._errors.append(error)

    def abort_choice(self, choice: int) -> None:
        """Let its workers drop one choice."""
        for session in self._sessions:
            session.command(session.worker.abort, self.request_id, choice)

    def leave(self, *, has_finished: bool) -> None:
        """Hear no more of it; abort what the workers have not ended themselves."""
        for session in self._sessions:
            if not has_finished:
                session.command(session.worker.abort, self.request_id, None)
        self._sessions.clear()


class Flight:
    """One request from its beginning to its end (router.flight.Flight), and what its client has got."""

    def __init__(self, world: "World", name: str, case: Case, tries_again: bool) -> None:
        self.name = name
        self.case = case
        self.tries_again = tries_again  # the client does, where a worker was lost
        self.ending: str | None = None
        self.outputs: list[list[int]] = [[] for _ in case.outcomes]
        self._world = world
        self._attempt: Attempt | None = None
        self._num_attempts = 0
        self._open = set(range(len(case.outcomes)))
        self._finished: set[int] = set()
        self._early: dict[tuple[int, int], TokenEvent] = {}
        self._first_tokens: dict[int, int] = {}

    def begin(self) -> None:
        """Begin the next attempt; a client waits for workers that are away."""
        router = self._world.router
        if self.ending is not None:
            return
        if router.prefill is None or router.decode is None:
            router.waiting.append(self)
            return
        self._num_attempts += 1
        number = self._num_attempts
        request_id = self.name if number == 1 else f"{self.name}/{number}"
        attempt = self._attempt = Attempt(self, request_id, router.prefill, router.decode)
        router.attempts[request_id] = attempt
        if attempt.is_local:
            self._world.count["attempt on one worker"] += 1
        self._world.log(
            f"router: attempt {request_id}, {len(self.case.prompt)} tokens, n={self.case.sampling.n}"
        )
        closed_choices = [choice for choice in range(len(self.outputs)) if choice not in self._open]
        attempt.start(dict(self._first_tokens), closed_choices)

    def abort(self) -> None:
        """The client has gone."""
        if self.ending is None:
            self._end("aborted")

    def abort_choice(self, choice: int) -> None:
        """The client wants no more of one choice."""
        if self.ending is not None or choice not in self._open:
            return
        self._open.discard(choice)
        if not self._open:
            self._end("aborted")
        elif self._attempt is not None:
            self._attempt.abort_choice(choice)

    # --- what the workers say -----------------------------------------------------------------------

    def take_ticket(self, session: Session, attempt: Attempt, ticket: Ticket) -> None:
        """Decode has pages."""
        if attempt.hears(session):
            attempt.compute(ticket, dict(self._first_tokens))

    def take_tokens(self, session: Session, attempt: Attempt, events: list[TokenEvent]) -> None:
        """A worker has sampled."""
        if not attempt.hears(session):
            return
        for event in events:
            self._early.setdefault((event.choice, event.position), event)
            if event.position == 0:
                self._first_tokens.setdefault(event.choice, event.token.token_id)
            else:
                attempt.decode_has_begun = True
        if attempt.decode_has_begun and (attempt.is_local or len(self._first_tokens) == len(self.outputs)):
            attempt.hand_over()
        self._pass_on()

    def take_error(self, session: Session, attempt: Attempt, error: str) -> None:
        """A worker has given up, or has gone."""
        if not attempt.hears(session):
            return
        attempt.fail(error)
        if attempt.error is not None:
            self._give_up(attempt, attempt.error)

    def _pass_on(self) -> None:
        """Give the client what is next in order."""
        for choice in sorted(self._open):
            output = self.outputs[choice]
            while (event := self._early.pop((choice, len(output)), None)) is not None:
                output.append(event.token.token_id)
                if event.finish_reason is not None:
                    self._open.discard(choice)
                    self._finished.add(choice)
                    if tuple(output) != self.case.outcomes[choice][0]:
                        raise Violation(f"{self.name}: choice {choice} ended with {output}")
        if not self._open:
            self._end("completed")

    def _give_up(self, attempt: Attempt, error: str) -> None:
        is_retried = error == FailureReason.TRANSFER.value and not attempt.decode_has_begun
        if not is_retried or self._num_attempts == MAX_ATTEMPTS:
            self._end(f"failed: {error}")
            return
        self._world.count["retry"] += 1
        self._leave(attempt, has_finished=False)
        self._attempt = None
        router = self._world.router
        if router.prefill is None or router.decode is None:
            self._end("failed: no worker")
        else:
            self.begin()

    def _end(self, how: str) -> None:
        self.ending = how
        self._world.count["request " + how] += 1
        self._world.log(f"router: {self.name} {how}")
        if self._attempt is not None:
            self._leave(self._attempt, has_finished=len(self._finished) == len(self.outputs))
        if self.tries_again and how == f"failed: {_LOST}":
            self._world.start(self.case, tries_again=False)

    def _leave(self, attempt: Attempt, *, has_finished: bool) -> None:
        attempt.leave(has_finished=has_finished)
        del self._world.router.attempts[attempt.request_id]
