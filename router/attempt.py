"""One try of a request on two workers: what is asked of them, and what becomes of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from baton.core.errors import BatonError, TransferFailed
from baton.core.request import EngineRequest
from baton.rpc import codec
from baton.v1 import transfer_pb2, worker_pb2
from router.inbox import Inbox
from router.worker_link import WorkerLink


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker, and the request as that worker is to get it."""

    link: WorkerLink
    request: EngineRequest


class Attempt:
    """One try, from the reservation on. Its inbox and its numbers are its own: no event of it, however late,
    reaches the request's next try."""

    def __init__(self, prefill: Assignment, decode: Assignment) -> None:
        self.inbox = Inbox()
        self.decode_has_begun = False
        self._prefill = prefill
        self._decode = decode
        self._numbers: dict[WorkerLink, int] = {}
        self._is_handed_over = False
        self._errors: list[BatonError] = []

    @property
    def error(self) -> BatonError | None:
        """What ended the attempt. A transfer that decode goes on from has not failed, whatever prefill says:
        only its acknowledgement was lost."""
        for error in self._errors:
            if not (self._is_handed_over and isinstance(error, TransferFailed)):
                return error
        return None

    def start(self, closed_choices: Iterable[int]) -> None:
        """Ask decode for pages, or prefill for the only token. Raises WorkerLost if one has just gone.

        Nobody wants `closed_choices` any more, or they have ended; decode does not compute them.
        """
        # Before the reservation, so that prompts that come meanwhile see this one's load.
        self._begin(self._prefill)
        if self._prefill.request.sampling.max_tokens > 1:
            self._reserve(closed_choices)
        else:
            self.prefill(None, {})

    def prefill(self, ticket: transfer_pb2.Ticket | None, first_tokens: Mapping[int, int]) -> None:
        """Let the prompt be computed, and its pages be sent as the ticket says.

        `first_tokens`, by choice, the client has got already.
        """
        work = self._work(self._prefill)
        prefill = worker_pb2.Prefill(work=work, ticket=ticket, first_tokens=first_tokens)
        self._prefill.link.send(worker_pb2.Command(prefill=prefill))

    def hand_over(self) -> None:
        """The pages have arrived: what becomes of the prefill server now is nothing to this request."""
        if not self._is_handed_over:
            self._is_handed_over = True
            self._prefill.link.end(self._numbers[self._prefill.link])

    def fail(self, error: BatonError) -> None:
        """A worker has given the request up, or has gone."""
        self._errors.append(error)

    def abort_choice(self, choice: int) -> None:
        """Let both workers drop one choice."""
        for link, number in self._numbers.items():
            link.send(worker_pb2.Command(abort=worker_pb2.Abort(number=number, choice=choice)))

    def leave(self, *, has_finished: bool) -> None:
        """Hear no more of it; abort what the workers have not ended themselves."""
        for link, number in self._numbers.items():
            if not has_finished:
                link.send(worker_pb2.Command(abort=worker_pb2.Abort(number=number)))
            link.end(number)
        self._numbers.clear()

    def _reserve(self, closed_choices: Iterable[int]) -> None:
        self._begin(self._decode)
        reserve = worker_pb2.Reserve(work=self._work(self._decode))
        self._decode.link.send(worker_pb2.Command(reserve=reserve))
        for choice in closed_choices:
            self.abort_choice(choice)

    def _begin(self, assignment: Assignment) -> None:
        request = assignment.request
        self._numbers[assignment.link] = assignment.link.begin(
            self.inbox, request.sampling.n, len(request.prompt_token_ids)
        )

    def _work(self, assignment: Assignment) -> worker_pb2.Work:
        return codec.work_to_proto(self._numbers[assignment.link], assignment.request)
