"""An engine without tensors whose tokens are right only if every byte of the KV that it reads is."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.core.kv_layout import KVLayout
from baton.core.page_ports import DevicePages
from baton.core.plan import ScheduledRow, StepPlan, StepResult
from baton.core.ports import LayersDone, SubmittedStep
from baton.core.sampling import SampledToken, SamplingParams, choice_seed
from baton.core.stopping import FinishReason, finish_reason

VOCABULARY_SIZE = 30_000
CONFIG_DIGEST = b"the fake config."
FINGERPRINT = CONFIG_DIGEST + b"the fake weights"
_STATE_BYTES = 8
_START = bytes(_STATE_BYTES)
_GATE_TIMEOUT_S = 20.0


def fake_layout(block_size: int = 4, num_layers: int = 2) -> KVLayout:
    """One head of two float32: eight bytes a slot in K, and eight in V."""
    return KVLayout(block_size, num_layers, num_kv_heads=1, head_dim=2, dtype="float32")


class BytesPages:
    """Implements `baton.core.page_ports.PageStore` on a bytearray, filled with a pattern that is no state."""

    device_pages: DevicePages | None = None

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.memory = memoryview(bytearray(b"\xa5" * (num_blocks * layout.bytes_per_block)))

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        assert 0 <= block_id < self.num_blocks
        assert 0 <= first_layer < first_layer + num_layers <= self.layout.num_layers
        start = block_id * self.layout.bytes_per_block + first_layer * self.layout.bytes_per_layer
        return self.memory[start : start + num_layers * self.layout.bytes_per_layer]

    def slots(self, block_id: int, slot: int) -> list[memoryview]:
        """The bytes of one token's K and V in every layer."""
        half = self.layout.bytes_per_layer // 2
        return [
            self.page(block_id, layer, 1)[at : at + _STATE_BYTES]
            for layer in range(self.layout.num_layers)
            for at in (slot * _STATE_BYTES, half + slot * _STATE_BYTES)
        ]


@dataclass(frozen=True, slots=True)
class FakeStep:
    """Implements `baton.core.ports.SubmittedStep`."""

    runner: "FakeRunner"
    plan: StepPlan
    layers_done: LayersDone | None

    def collect(self) -> StepResult:
        """See SubmittedStep."""
        return self.runner.run(self.plan, self.layers_done)


class FakeRunner:
    """Implements `baton.core.ports.Runner`: a slot holds the state of its token and of all before it."""

    depth = 1

    def __init__(self, store: BytesPages) -> None:
        self.num_steps = 0
        self.gate = threading.Event()  # a step waits for it
        self.gate.set()
        self.poison: int | None = None  # a step with this token fails
        self.is_held = threading.Event()  # a step waits at the gate
        self._store = store

    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> SubmittedStep:
        """See Runner."""
        return FakeStep(self, plan, layers_done)

    def run(self, plan: StepPlan, layers_done: LayersDone | None = None) -> StepResult:
        """Compute, when the step is collected."""
        if not self.gate.is_set():
            self.is_held.set()
            assert self.gate.wait(_GATE_TIMEOUT_S), "the test has left a step at the gate"
            self.is_held.clear()
        if any(self.poison in row.token_ids for row in plan.rows):
            raise RuntimeError("poisoned")
        num_layers = self._store.layout.num_layers
        for source, destination in plan.block_copies:
            self._store.page(destination, 0, num_layers)[:] = self._store.page(source, 0, num_layers)
        for row in plan.rows:
            self._compute(row)
        if layers_done is not None:
            for end_layer in range(1, num_layers):
                layers_done(end_layer)
        self.num_steps += 1
        return StepResult(tuple(self._sample(row) for row in plan.rows))

    def idle(self) -> None:
        """See Runner."""

    def _compute(self, row: ScheduledRow) -> None:
        state = self._read(row, row.start - 1) if row.start else _START
        for position, token_id in enumerate(row.token_ids, row.start):
            state = _next_state(state, token_id)
            for index, place in enumerate(self._slots(row, position)):
                place[:] = _tagged(state, index)

    def _sample(self, row: ScheduledRow) -> tuple[SampledToken, ...]:
        if not row.samples:
            return ()
        state = self._read(row, row.start + len(row.token_ids) - 1)
        return tuple(
            SampledToken(_token(state, task.params, task.seed, task.position)) for task in row.samples
        )

    def _read(self, row: ScheduledRow, position: int) -> bytes:
        """The state of a slot; anything else where its layers do not agree."""
        found = [_tagged(bytes(place), index) for index, place in enumerate(self._slots(row, position))]
        return found[0] if len(set(found)) == 1 else hashlib.blake2b(b"".join(found), digest_size=8).digest()

    def _slots(self, row: ScheduledRow, position: int) -> list[memoryview]:
        block, slot = divmod(position, self._store.layout.block_size)
        return self._store.slots(row.block_table[block], slot)


@dataclass(frozen=True, slots=True)
class FakeEngine:
    """Implements `baton.core.ports.LoadedEngine`."""

    runner: FakeRunner
    page_store: BytesPages | Any
    max_model_len: int
    vocab_size: int
    fingerprint: bytes
    grammars: Any = None  # its tokens are no text


def load_fake_engine(
    layout: KVLayout, num_blocks: int, max_model_len: int = 512, fingerprint: bytes = FINGERPRINT
) -> FakeEngine:
    """A fresh engine; its pages hold nothing."""
    store = BytesPages(layout, num_blocks)
    return FakeEngine(FakeRunner(store), store, max_model_len, VOCABULARY_SIZE, fingerprint)


def expected(
    prompt: Sequence[int], params: SamplingParams, max_model_len: int = 512
) -> list[tuple[list[int], FinishReason]]:
    """The oracle: tokens and end of every choice, from the tokens alone."""
    outcomes = []
    for choice in range(params.n):
        state = _START
        for token_id in prompt:
            state = _next_state(state, token_id)
        output: list[int] = []
        reason = None
        while reason is None:
            position = len(prompt) + len(output)
            token_id = _token(state, params, choice_seed(params.seed, choice), position)
            state = _next_state(state, token_id)
            output.append(token_id)
            reason = finish_reason(params, token_id, len(output), position + 1, max_model_len)
        outcomes.append((output, reason))
    return outcomes


def _next_state(state: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(state + token_id.to_bytes(4, "little"), digest_size=_STATE_BYTES).digest()


def _tagged(state: bytes, index: int) -> bytes:
    """Differs between layers, and between K and V; its own inverse."""
    return bytes(byte ^ (17 * index + 1) % 256 for byte in state)


def _token(state: bytes, params: SamplingParams, seed: int, position: int) -> int:
    words = (0 if params.is_greedy else seed).to_bytes(8, "little") + position.to_bytes(4, "little")
    digest = hashlib.blake2b(state + words, digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCABULARY_SIZE
