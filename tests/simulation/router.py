"""The router in virtual time: what Flight, Attempt and WorkerLink do, and what each client gets."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.core.commands import FailureReason
from baton.core.request import EngineRequest, TokenEvent
from baton.core.ticket import Ticket
from tests.simulation.cases import Case
from tests.simulation.schedule import Violation
from tests.simulation.sessions import Session

if TYPE_CHECKING:
    from tests.simulation.world import World

MAX_ATTEMPTS = 3
MAX_LOSSES = 1  # in a row
RECONNECT_DELAY_S = 0.5
_LOST = "worker lost"


class Router:
    """Sessions with both workers, and the attempts that listen to them."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.prefill: Session | None = None
        self.decode: Session | None = None
        self.attempts: dict[str, Attempt] = {}  # by request id, until they are left
        self.waiting: list[Callable[[], None]] = []  # what is to be tried when both workers are there

    def connect(self) -> None:
        """Open the sessions that are missing."""
        world = self._world
        if self.prefill is None:
            self.prefill = Session(world, world.prefill, self._lost)
        if self.decode is None:
            self.decode = Session(world, world.decode, self._lost)
        waiting, self.waiting = self.waiting, []
        for try_again in waiting:
            try_again()

    def _lost(self, session: Session) -> None:
        if session is self.prefill:
            self.prefill = None
        elif session is self.decode:
            self.decode = None
        self._world.after(RECONNECT_DELAY_S, self.connect)
        for attempt in list(self.attempts.values()):
            attempt.flight.take_error(session, attempt, _LOST)


class Attempt:
    """One try of a request, or of a choice of it, on its workers (baton_router.requests.attempt.Attempt)."""

    def __init__(
        self,
        flight: "Flight",
        request_id: str,
        choices: tuple[int, ...],
        answered: tuple[int, ...],
        number: int,
        num_losses_before: int,
        prefill: Session,
        decode: Session,
    ) -> None:
        self.flight = flight
        self.request_id = request_id
        self.choices = choices
        self.number = number
        self.prefill = prefill
        self.decode = decode
        self.is_local = flight.case.is_local  # decode does it all
        self._answered = answered
        self._num_losses_before = num_losses_before
        self._num_first_tokens = 0
        self._decode_has_begun = False
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

    @property
    def num_losses(self) -> int:
        """Sessions that were lost since decode last sent a token."""
        num_before = 0 if self._decode_has_begun else self._num_losses_before
        return num_before + (self.error == _LOST)

    def hears(self, session: Session) -> bool:
        """Whether it matters to the attempt what comes over a session, or that it is lost."""
        return session in self._sessions and not (self._is_handed_over and session is self.prefill)

    def start(self) -> None:
        """Ask decode for pages, or prefill for the last token, or decode for everything."""
        if self.flight.case.sampling.max_tokens == len(self._answered) + 1:
            if self.is_local:
                self._sessions.append(self.prefill)
            self.compute(None)
            return
        self._sessions.append(self.decode)
        decode = self.decode.worker
        command = decode.run_here if self.is_local else decode.reserve
        self.decode.command(command, self._request(decode.pages.layout.block_size))

    def compute(self, ticket: Ticket | None) -> None:
        """Let the prompt be computed."""
        prefill = self.prefill.worker
        request = self._request(prefill.pages.layout.block_size)
        self.prefill.command(prefill.prefill_prompt, request, ticket)

    def note_token(self, position: int) -> None:
        """A token has come; once all of prefill's and one of decode's have, the pages have arrived, and what
        becomes of the prefill server is nothing to this request."""
        if position == len(self._answered):
            self._num_first_tokens += 1
        else:
            self._decode_has_begun = True
        if self._decode_has_begun and (self.is_local or self._num_first_tokens == len(self.choices)):
            self._is_handed_over = True

    def fail(self, error: str) -> None:
        """A worker has given up, or has gone."""
        self._errors.append(error)

    def abort_choice(self, choice: int) -> None:
        """Let its workers drop one choice."""
        index = self.choices.index(choice)
        for session in self._sessions:
            session.command(session.worker.abort, self.request_id, index)

    def leave(self, *, has_finished: bool) -> None:
        """Hear no more of it; abort what the workers have not ended themselves."""
        for session in self._sessions:
            if not has_finished:
                session.command(session.worker.abort, self.request_id, None)
        self._sessions.clear()

    def _request(self, block_size: int) -> EngineRequest:
        return self.flight.case.request(self.request_id, block_size, self.choices, self._answered)


class Flight:
    """One request from beginning to end (baton_router.requests.flight.Flight), and what the client got."""

    def __init__(self, world: "World", name: str, case: Case, tries_again: bool) -> None:
        self.name = name
        self.case = case
        self.tries_again = tries_again  # the client does, where a worker was lost
        self.ending: str | None = None
        self.outputs: list[list[int]] = [[] for _ in case.outcomes]
        self.choices_of: dict[str, tuple[int, ...]] = {}  # of each attempt, by request id
        self._world = world
        self._attempts: list[Attempt] = []  # under way
        self._open = set(range(len(case.outcomes)))
        self._finished: set[int] = set()
        self._early: dict[tuple[int, int], TokenEvent] = {}

    def begin(self) -> None:
        """Begin; a client waits for workers that are away."""
        self._place(tuple(range(len(self.outputs))), 1, 0)

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
        for attempt in self._attempts:
            if choice in attempt.choices and self._open.intersection(attempt.choices):
                attempt.abort_choice(choice)
        self._leave_ended()

    # --- attempts -----------------------------------------------------------------------------------

    def _place(self, choices: tuple[int, ...], number: int, num_losses_before: int) -> None:
        """Begin attempts for the open ones of some choices, now or when both workers are there.

        What production does at once, on other workers, happens here when the lost one is back: with none of
        its pages.
        """
        router = self._world.router
        if router.prefill is None or router.decode is None:
            router.waiting.append(lambda: self._place(choices, number, num_losses_before))
            return
        for part in self._parts(choices):
            request_id = self.name + (f"/{len(self.choices_of) + 1}" if self.choices_of else "")
            self.choices_of[request_id] = part
            answered = tuple(self.outputs[part[0]]) if len(part) == 1 else ()
            attempt = Attempt(
                self, request_id, part, answered, number, num_losses_before, router.prefill, router.decode
            )
            self._attempts.append(attempt)
            router.attempts[request_id] = attempt
            if attempt.is_local:
                self._world.count["attempt on one worker"] += 1
            if len(answered) > 1:
                self._world.count["answer goes on"] += 1
            self._world.log(
                f"router: attempt {request_id}, {len(self.case.prompt)} + {len(answered)} tokens, "
                f"choices {part}"
            )
            attempt.start()

    def _parts(self, choices: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Together as they began, or one by one where they differ."""
        is_open = [choice in self._open for choice in choices]
        if all(is_open) and not any(self.outputs[choice] for choice in choices):
            return [choices]
        return [(choice,) for choice in choices if choice in self._open]

    def _leave(self, attempt: Attempt) -> None:
        attempt.leave(has_finished=self._finished.issuperset(attempt.choices))
        self._attempts.remove(attempt)
        del self._world.router.attempts[attempt.request_id]

    def _leave_ended(self) -> None:
        for attempt in list(self._attempts):
            if not self._open.intersection(attempt.choices):
                self._leave(attempt)

    # --- what the workers say -----------------------------------------------------------------------

    def take_ticket(self, session: Session, attempt: Attempt, ticket: Ticket) -> None:
        """Decode has pages."""
        if attempt.hears(session):
            attempt.compute(ticket)

    def take_tokens(self, session: Session, attempt: Attempt, events: list[TokenEvent]) -> None:
        """A worker has sampled."""
        if not attempt.hears(session):
            return
        for event in events:
            self._early[attempt.choices[event.choice], event.position] = event
            attempt.note_token(event.position)
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
        self._leave_ended()

    def _give_up(self, attempt: Attempt, error: str) -> None:
        is_lost = error == _LOST and attempt.num_losses <= MAX_LOSSES
        is_retried = error == FailureReason.TRANSFER.value or is_lost
        if not is_retried or attempt.number == MAX_ATTEMPTS:
            self._end(f"failed: {error}")
            return
        self._world.count["retry"] += 1
        self._leave(attempt)
        for choice, position in list(self._early):
            if choice in attempt.choices:
                del self._early[choice, position]
        router = self._world.router
        if not is_lost and (router.prefill is None or router.decode is None):
            self._end("failed: no worker")
        else:
            self._place(attempt.choices, attempt.number + 1, attempt.num_losses)

    def _end(self, how: str) -> None:
        self.ending = how
        self._world.count["request " + how] += 1
        self._world.log(f"router: {self.name} {how}")
        self._open.clear()
        self._leave_ended()
        if self.tries_again and how == f"failed: {_LOST}":
            self._world.start(self.case, tries_again=False)
