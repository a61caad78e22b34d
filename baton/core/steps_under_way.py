"""The steps that were planned and have not ended, and what sequences have in them."""

from baton.core.plan import ScheduledRow
from baton.core.request import Phase, SequenceState

MAX_STEPS_UNDER_WAY = 2  # so that an awaited token is always one of the step planned last


class StepsUnderWay:
    """Keeps the counters of sequences that are about steps under way."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._row_in_last: dict[SequenceState, int] = {}

    def __bool__(self) -> bool:
        return self._num_steps > 0

    def row_to_follow(self, sequence: SequenceState) -> int | None:
        """The row of the step planned last that samples the sequence's awaited token, if one is awaited."""
        return self._row_in_last[sequence] if sequence.num_awaited_tokens else None

    def begin(self, sequences: tuple[SequenceState, ...], rows: tuple[ScheduledRow, ...]) -> None:
        """A step of these rows is planned."""
        self._num_steps += 1
        assert self._num_steps <= MAX_STEPS_UNDER_WAY
        self._row_in_last = {}
        for index, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
            sequence.num_steps_under_way += 1
            sequence.num_tokens_under_way += len(row.token_ids)
            if row.samples:
                sequence.num_awaited_tokens += 1
                self._row_in_last[sequence] = index

    def end(
        self, sequences: tuple[SequenceState, ...], rows: tuple[ScheduledRow, ...]
    ) -> list[SequenceState]:
        """The step is over; returns the sequences that ended meanwhile and are in no step any more."""
        self._num_steps -= 1
        for sequence, row in zip(sequences, rows, strict=True):
            sequence.num_steps_under_way -= 1
            sequence.num_tokens_under_way -= len(row.token_ids)
            sequence.num_awaited_tokens -= bool(row.samples)
        return [
            sequence
            for sequence in sequences
            if sequence.phase is Phase.FINISHED and not sequence.num_steps_under_way
        ]
