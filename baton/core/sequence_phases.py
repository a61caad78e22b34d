"""The sequences of one engine: which wait, which run, and which request each belongs to."""

from bisect import insort
from collections.abc import Sequence

from baton.core.request import Phase, SequenceState
from baton.core.rows import choices_to_sample
from baton.core.sequence_pages import SequencePages


class SequencePhases:
    """Moves sequences from phase to phase, and takes the pages of those that leave the batch."""

    def __init__(self, pages: SequencePages) -> None:
        self.running: list[SequenceState] = []
        self.waiting: list[SequenceState] = []  # by SequenceState.order
        self._pages = pages
        self._by_request: dict[str, list[SequenceState]] = {}

    @property
    def num_slots_taken(self) -> int:
        """Places in the batch that running sequences take, or will."""
        return sum(map(num_slots, self.running))

    def of_request(self, request_id: str) -> Sequence[SequenceState]:
        """A request's sequences that have not finished."""
        return self._by_request.get(request_id, ())

    def wait(self, sequence: SequenceState) -> None:
        """Queue a new sequence."""
        self._by_request.setdefault(sequence.request.request_id, []).append(sequence)
        self._wait(sequence)

    def run(self, sequence: SequenceState) -> None:
        """Let a new sequence that has its prompt's pages join the batch."""
        self._by_request.setdefault(sequence.request.request_id, []).append(sequence)
        self._run(sequence)

    def fork(self, parent: SequenceState, child: SequenceState) -> None:
        """Let a new sequence go on from its parent's prompt, or wait and find it in the prefix cache."""
        child.has_begun = True
        if self._pages.share_prompt(parent, child):
            self.run(child)
        else:
            self.wait(child)

    def admit_first(self) -> None:
        """Let the first that waits join the batch: it has got pages."""
        self._run(self.waiting.pop(0))

    def preempt_last(self) -> SequenceState:
        """Take the pages of the running sequence that goes last; it computes its tokens again later."""
        victim = max(self.running, key=lambda running: running.order)
        self.running.remove(victim)
        self._pages.drop(victim)
        self._wait(victim)
        return victim

    def finish(self, sequence: SequenceState) -> None:
        """The sequence has ended. It keeps its pages while a step that may write them is under way."""
        siblings = self._by_request[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.request_id]
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED
        if not sequence.num_steps_under_way:
            self._pages.drop(sequence)

    def _wait(self, sequence: SequenceState) -> None:
        sequence.phase = Phase.WAITING
        insort(self.waiting, sequence, key=lambda waiting: waiting.order)

    def _run(self, sequence: SequenceState) -> None:
        sequence.phase = Phase.RUNNING
        sequence.has_begun = True
        self.running.append(sequence)


def num_slots(sequence: SequenceState) -> int:
    """Places in the batch that a sequence takes, or will when its prompt is computed and it forks."""
    if sequence.output_token_ids or sequence.hands_over:
        return 1
    return len(choices_to_sample(sequence))
