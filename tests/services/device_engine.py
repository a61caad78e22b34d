"""Fake engines whose pages transfers may only reach as pages on a device: the same code, on CPU tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.engine.page_staging import PageStaging
from tests.same_process_ipc import SameProcessIpc
from tests.services.fake_engine import BytesPages, FakeEngine


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
    """What the engine has computed gets onto the device only when somebody waits for a mark."""
    return _with(engine, LateStaging(engine.page_store))


class LateStaging(PageStaging):
    """A device whose memory is as it was until a mark is waited for: the worst that a real one may be."""

    def __init__(self, computed: BytesPages) -> None:
        self._computed = _tensor_of(computed)
        self._reached = torch.zeros_like(self._computed)
        super().__init__(self._reached, SameProcessIpc())

    def mark(self) -> "LateMark":  # type: ignore[override]
        return LateMark(self._computed.clone(), self._reached)


class LateMark:
    """Implements baton.core.ports.Mark."""

    def __init__(self, computed: Tensor, reached: Tensor) -> None:
        self._computed = computed
        self._reached = reached

    def wait(self) -> None:
        self._reached.copy_(self._computed)


def _tensor_of(pages: BytesPages) -> Tensor:
    layout = pages.layout
    flat = torch.frombuffer(pages.memory, dtype=getattr(torch, layout.dtype))
    return flat.view(-1, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)


def _with(engine: FakeEngine, staging: PageStaging) -> FakeEngine:
    store = DeviceStore(engine.page_store.layout, engine.page_store.num_blocks, staging)
    return replace(engine, page_store=store)
