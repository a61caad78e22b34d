"""One try of a request, or of one choice: what is asked of its workers, and what becomes of it."""

from dataclasses import dataclass

from baton.core.errors import BatonError, TransferFailed, WorkerLost
from baton.core.request import EngineRequest
from baton.rpc import codec
from baton.v1 import transfer_pb2, worker_pb2
from baton_router.workers.inbox import Inbox
from baton_router.workers.worker_link import WorkerLink


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

    def __init__(
        self,
        choices: tuple[int, ...],
        prefill: Assignment,
        decode: Assignment,
        inbox: Inbox,
        number: int,
        num_losses_before: int,
    ) -> None:
        """`choices`: of the client's request; their places here are what the workers know them by. Attempts
        are numbered from 1, by choice. `num_losses_before`: what `num_losses` of the last one was."""
        self.choices = choices
        self.inbox = inbox
        self.number = number
        self._num_losses_before = num_losses_before
        self._prefill = prefill
        self._decode = decode
        self._numbers: dict[WorkerLink, int] = {}
        self._num_first_tokens = 0
        self._decode_has_begun = False
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
    def num_losses(self) -> int:
        """Losses in a row, this attempt's own included, since decode last sent a token of these choices."""
        num_before = 0 if self._decode_has_begun else self._num_losses_before
        return num_before + isinstance(self.error, WorkerLost)

    @property
    def _is_local(self) -> bool:
        """Whether one worker does it all."""
        return self._prefill.link is self._decode.link

    @property
    def is_on_draining_worker(self) -> bool:
        """Whether one of its workers is about to stop."""
        return any(link.is_draining for link in self._numbers)

    def start(self) -> None:
        """Ask decode for pages, or prefill for the last token, or one worker for everything.

        Raises WorkerLost if a worker has just gone.
        """
        request = self._prefill.request
        # Before the reservation, so that prompts that come meanwhile see this one's load.
        self._begin(self._prefill, request.num_tokens)
        if request.sampling.max_tokens == len(request.answered_token_ids) + 1:
            self.prefill(None)
        elif self._is_local:
            self._run_locally()
        else:
            self._reserve()

    def prefill(self, ticket: transfer_pb2.Ticket | None) -> None:
        """Let the prompt be computed, and its pages be sent as the ticket says."""
        prefill = worker_pb2.Prefill(work=self._work(self._prefill), ticket=ticket)
        self._prefill.link.send(worker_pb2.Command(prefill=prefill))

    def note_token(self, position: int) -> None:
        """A token has come: of each choice's, the first that was not answered before is prefill's."""
        if position == len(self._prefill.request.answered_token_ids):
            self._num_first_tokens += 1
        else:
            self._decode_has_begun = True
        # A choice that nobody wants any more has no first token where one worker does it all.
        if self._decode_has_begun and (self._is_local or self._num_first_tokens == len(self.choices)):
            self._hand_over()

    def _hand_over(self) -> None:
        """The pages have arrived: what becomes of the prefill server now is nothing to this request."""
        if self._is_handed_over:
            return
        self._is_handed_over = True
        link = self._prefill.link
        if self._is_local:
            link.prompt_computed(self._numbers[link])
        else:
            link.done(self._numbers[link])

    def fail(self, error: BatonError) -> None:
        """A worker has given the request up, or has gone."""
        self._errors.append(error)

    def abort_choice(self, choice: int) -> None:
        """Let its workers drop one choice."""
        index = self.choices.index(choice)
        for link, number in self._numbers.items():
            link.send(worker_pb2.Command(abort=worker_pb2.Abort(number=number, choice=index)))

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

    def _run_locally(self) -> None:
        prefill = worker_pb2.Prefill(work=self._work(self._decode), decodes_here=True)
        self._decode.link.send(worker_pb2.Command(prefill=prefill))

    def _begin(self, assignment: Assignment, num_tokens: int) -> None:
        """`num_tokens` of the prompt the worker is to compute."""
        self._numbers[assignment.link] = assignment.link.begin(
            self.inbox, assignment.request.sampling.n, num_tokens
        )

    def _work(self, assignment: Assignment) -> worker_pb2.Work:
        return codec.work_to_proto(self._numbers[assignment.link], assignment.request)
