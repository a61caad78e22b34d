"""One try of a request on its workers: what is asked of them, and what becomes of it."""

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
    reaches the request's next try.

    Where one worker is to do both, it is one errand of that worker, with nothing to reserve or to send.
    """

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

    @property
    def is_local(self) -> bool:
        """Whether one worker does it all."""
        return self._prefill.link is self._decode.link

    @property
    def is_on_draining_worker(self) -> bool:
        """Whether one of its workers is about to stop."""
        return any(link.is_draining for link in self._numbers)

    def start(self, first_tokens: Mapping[int, int], closed_choices: Iterable[int]) -> None:
        """Ask decode for pages, or prefill for the only token, or one worker for everything.

        `first_tokens`, by choice, the client has got already. Nobody wants `closed_choices` any more, or
        they have ended; they are not decoded. Raises WorkerLost if a worker has just gone.
        """
        # Before the reservation, so that prompts that come meanwhile see this one's load.
        self._begin(self._prefill, len(self._prefill.request.prompt_token_ids))
        if self._prefill.request.sampling.max_tokens == 1:
            self.prefill(None, {})
            return
        if self.is_local:
            self._run_locally(first_tokens)
        else:
            self._reserve()
        for choice in closed_choices:
            self.abort_choice(choice)

    def prefill(self, ticket: transfer_pb2.Ticket | None, first_tokens: Mapping[int, int]) -> None:
        """Let the prompt be computed, and its pages be sent as the ticket says.

        `first_tokens`, by choice, the client has got already.
        """
        work = self._work(self._prefill)
        prefill = worker_pb2.Prefill(work=work, ticket=ticket, first_tokens=first_tokens)
        self._prefill.link.send(worker_pb2.Command(prefill=prefill))

    def hand_over(self) -> None:
        """The pages have arrived: what becomes of the prefill server now is nothing to this request."""
        if self._is_handed_over:
            return
        self._is_handed_over = True
        link = self._prefill.link
        if self.is_local:
            link.prompt_computed(self._numbers[link])
        else:
            link.done(self._numbers[link])

    def fail(self, error: BatonError) -> None:
        """A worker has given the request up, or has gone."""
        self._errors.append(error)

    def abort_choice(self, choice: int) -> None:
        """Let its workers drop one choice."""
        for link, number in self._numbers.items():
            link.send(worker_pb2.Command(abort=worker_pb2.Abort(number=number, choice=choice)))

    def leave(self, *, has_finished: bool) -> None:
        """Hear no more of it; abort what the workers have not ended themselves."""
        for link, number in self._numbers.items():
            if not has_finished:
                link.send(worker_pb2.Command(abort=worker_pb2.Abort(number=number)))
            link.end(number)
        self._numbers.clear()

    def _reserve(self) -> None:
        self._begin(self._decode, num_tokens=0)
        reserve = worker_pb2.Reserve(work=self._work(self._decode))
        self._decode.link.send(worker_pb2.Command(reserve=reserve))

    def _run_locally(self, first_tokens: Mapping[int, int]) -> None:
        work = self._work(self._decode)
        prefill = worker_pb2.Prefill(work=work, first_tokens=first_tokens, decodes_here=True)
        self._decode.link.send(worker_pb2.Command(prefill=prefill))

    def _begin(self, assignment: Assignment, num_tokens: int) -> None:
        """`num_tokens` of the prompt the worker is to compute."""
        self._numbers[assignment.link] = assignment.link.begin(
            self.inbox, assignment.request.sampling.n, num_tokens
        )

    def _work(self, assignment: Assignment) -> worker_pb2.Work:
        return codec.work_to_proto(self._numbers[assignment.link], assignment.request)
