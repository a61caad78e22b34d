"""A runner whose tokens are right only if every byte of KV that it reads is; it computes layer by layer."""

from array import array

from baton.core.plan import ScheduledRow, StepResult
from baton.core.request import SequenceState
from baton.core.sampling import SampledToken
from baton.core.scheduler import ScheduledStep
from tests.simulation.cases import next_state, sample, states_of
from tests.simulation.pages import NUM_LAYERS, STATE_BYTES, Pages
from tests.simulation.schedule import Violation

# What makes the bytes of a state differ between layers, and between K and V.
_TAGS = tuple(
    (0x9E3779B97F4A7C15 * (2 * layer + 1) >> 3, 0xC2B2AE3D27D4EB4F >> layer) for layer in range(NUM_LAYERS)
)

_packed: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}


class PageRunner:
    """Stands for `baton.core.ports.Runner`, in the parts between which other things happen."""

    def __init__(self, name: str, pages: Pages) -> None:
        self._name = name
        self._pages = pages
        self._block_size = pages.layout.block_size
        self._states: dict[SequenceState, list[int]] = {}
        self._rows: list[tuple[ScheduledRow, list[int], str]] = []  # of the step under way

    def begin(self, step: ScheduledStep) -> None:
        """Copy pages, as every step begins."""
        pages = self._pages
        for source, destination in step.plan.block_copies:
            pages.raw_page(destination, 0, NUM_LAYERS)[:] = pages.raw_page(source, 0, NUM_LAYERS)
        self._rows = [
            (row, self._states_of(sequence), sequence.request.request_id)
            for sequence, row in zip(step.sequences, step.plan.rows, strict=True)
        ]

    def compute(self, layer: int) -> None:
        """One layer of all rows: read what was computed before, write what is new."""
        for row, states, request_id in self._rows:
            if row.start:
                self._check(row, states, layer, request_id)
            self._write(row, states, layer)

    def sample(self) -> StepResult:
        """The tokens that the plan asks for."""
        return StepResult(
            tuple(
                tuple(
                    [
                        SampledToken(sample(states[task.position - 1], task.seed, task.position))
                        for task in row.samples
                    ]
                )
                for row, states, _ in self._rows
            )
        )

    def _states_of(self, sequence: SequenceState) -> list[int]:
        """Of all its tokens so far."""
        states = self._states.get(sequence)
        if states is None:
            states = self._states[sequence] = list(states_of(sequence.request.prompt_token_ids))
        num_output = len(states) - sequence.num_prompt_tokens
        for token_id in sequence.output_token_ids[num_output:]:
            states.append(next_state(states[-1], token_id))
        return states

    def _check(self, row: ScheduledRow, states: list[int], layer: int, request_id: str) -> None:
        """Every byte before the row must be what its request computed, here or elsewhere."""
        size, content = self._block_size, self._pages.bytes
        half = size * STATE_BYTES
        for first in range(0, row.start, size):
            end = min(first + size, row.start)
            block = row.block_table[first // size]
            at = self._pages.offset(block, layer)
            keys, values = _bytes_of(states, first, end, layer)
            if not (content.startswith(keys, at) and content.startswith(values, at + half)):
                raise Violation(
                    f"{self._name} computes {request_id} with wrong K or V of tokens {first} to {end - 1}, "
                    f"layer {layer}, in page {block}"
                )

    def _write(self, row: ScheduledRow, states: list[int], layer: int) -> None:
        size, content = self._block_size, self._pages.bytes
        half = size * STATE_BYTES
        start, stop = row.start, row.start + len(row.token_ids)
        while start < stop:
            index, slot = divmod(start, size)
            end = min(stop, start - slot + size)
            at = self._pages.offset(row.block_table[index], layer) + slot * STATE_BYTES
            num_bytes = (end - start) * STATE_BYTES
            keys, values = _bytes_of(states, start, end, layer)
            content[at : at + num_bytes] = keys
            content[at + half : at + half + num_bytes] = values
            start = end


def _bytes_of(states: list[int], start: int, end: int, layer: int) -> tuple[bytes, bytes]:
    """The K and V of tokens [start, end) in one layer."""
    which = (states[end - 1], end - start, layer)
    packed = _packed.get(which)
    if packed is None:
        key, value = _TAGS[layer]
        packed = _packed[which] = (_pack(states[start:end], key), _pack(states[start:end], value))
    return packed


def _pack(states: list[int], tag: int) -> bytes:
    return array("Q", [state ^ tag for state in states]).tobytes()
