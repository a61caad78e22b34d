"""Fake engines whose pages transfers may only reach as pages on a device: the same code, on CPU tensors."""

import threading
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.core.plan import StepPlan, StepResult
from baton.core.ports import LayersDone
from baton.engine.pages.page_staging import PageStaging
from tests.same_process_ipc import SameProcessIpc
from tests.services.fake_engine import BytesPages, FakeEngine, FakeRunner

_TIMEOUT_S = 20.0


class DeviceStore:
    """A PageStore as one on a GPU is: no host memory."""

    def __init__(self, layout: KVLayout, num_blocks: int, device_pages: PageStaging) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device_pages = device_pages

    @property
    def memory(self) -> memoryview:
        raise BufferError("these pages are not host memory")

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        raise BufferError("these pages are not host memory")


def on_device(engine: FakeEngine) -> FakeEngine:
    """The engine computes on the very memory that its transfers see as a device's."""
    return _with(engine, PageStaging(_tensor_of(engine.page_store), SameProcessIpc()))


def on_late_device(engine: FakeEngine) -> FakeEngine:
    """The device does what it was given only when somebody waits for it, a step ahead of the host's."""
    staging = LateStaging(engine.page_store)
    return _with(replace(engine, runner=LateRunner(engine.page_store, staging)), staging)


class LateStaging(PageStaging):
    """A device whose memory is as it was until a mark is waited for: the worst that a real one may be."""

    def __init__(self, computed: BytesPages) -> None:
        self._computed = _tensor_of(computed)
        self._on_device = torch.zeros_like(self._computed)
        self.marks: list[LateMark] = []  # of the step submitted last
        self._num_marks = 0
        self._last_reached = 0
        self._lock = threading.Lock()
        super().__init__(self._on_device, SameProcessIpc())

    def mark(self) -> "LateMark":  # type: ignore[override]
        self._num_marks += 1
        self.marks.append(LateMark(self, self._num_marks, self._computed.clone()))
        return self.marks[-1]

    def reach(self, mark: "LateMark") -> None:
        """Do what was queued before the mark; the engine's thread and others wait, and not in order."""
        with self._lock:
            if mark.number > self._last_reached:
                self._on_device.copy_(mark.computed)
                self._last_reached = mark.number


@dataclass(frozen=True, slots=True)
class LateMark:
    """Implements baton.core.page_ports.Mark."""

    device: LateStaging
    number: int
    computed: Tensor
    is_reached: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """See Mark."""
        self.device.reach(self)
        self.is_reached.set()


@dataclass(frozen=True, slots=True)
class LateStep:
    """Implements baton.core.ports.SubmittedStep."""

    result: StepResult
    layers: list[LateMark]
    end: LateMark

    def collect(self) -> StepResult:
        """See SubmittedStep. A step takes longer than it takes to read layers of it that nobody waits for."""
        for mark in self.layers:
            assert mark.is_reached.wait(_TIMEOUT_S), "layers were told of, and nobody has waited for them"
        self.end.wait()
        return self.result


class LateRunner(FakeRunner):
    """Queues a step when it is submitted, and tells of layers then."""

    depth = 2

    def __init__(self, computed: BytesPages, device: LateStaging) -> None:
        super().__init__(computed)
        self._device = device
        self._last = StepResult(())

    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> LateStep:
        """See Runner."""
        rows = tuple(
            row if row.follows is None else replace(row, token_ids=self._tokens_of(row.follows))
            for row in plan.rows
        )
        self._device.marks = []
        self._last = self.run(replace(plan, rows=rows), layers_done)
        return LateStep(self._last, list(self._device.marks), self._device.mark())

    def _tokens_of(self, row: int) -> tuple[int, ...]:
        """That the step before sampled for one of its rows."""
        [token] = self._last.samples[row]
        return (token.token_id,)


def _tensor_of(pages: BytesPages) -> Tensor:
    layout = pages.layout
    flat = torch.frombuffer(pages.memory, dtype=getattr(torch, layout.dtype))
    return flat.view(-1, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)


def _with(engine: FakeEngine, staging: PageStaging) -> FakeEngine:
    store = DeviceStore(engine.page_store.layout, engine.page_store.num_blocks, staging)
    return replace(engine, page_store=store)
