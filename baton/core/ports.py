"""What the core and the services need from the parts that know tensors."""

from collections.abc import Callable
from typing import Protocol

from baton.core.kv_layout import KVLayout
from baton.core.plan import StepPlan, StepResult

LayersDone = Callable[[int], None]


class SubmittedStep(Protocol):
    """A step that a runner has taken on."""

    def collect(self, layers_done: LayersDone | None = None) -> StepResult:
        """Wait for the step's end; once for each step, in the order of submission.

        `layers_done`, if given, is told a few times meanwhile, on the same thread, before which layer all K
        and V are written; never for the last layer. Raises what the step failed of. The step is over either
        way: it writes to no page any more.
        """
        ...


class Runner(Protocol):
    """Computes steps, one after the other in the order of submission; knows tensors, not requests."""

    @property
    def depth(self) -> int:
        """Steps that may be submitted and not collected: 1, or 2 where one computes while the next one is
        prepared."""
        ...

    def submit(self, plan: StepPlan) -> SubmittedStep:
        """Copy pages, write the rows' K and V into their pages, and sample what the plan asks for; nothing of
        `plan` is read after the return. Raises what it failed of, when nothing of the step runs any more.

        A runner of depth 1 reads `plan` and computes in `collect`, at once after `submit`.
        """
        ...

    def idle(self) -> None:
        """There is nothing to compute until the next `submit`."""
        ...


class PageStore(Protocol):
    """The bytes of the KV pool, for transfers."""

    @property
    def layout(self) -> KVLayout:
        """Layout of every page in the pool."""
        ...

    @property
    def num_blocks(self) -> int:
        """Pages in the pool."""
        ...

    @property
    def memory(self) -> memoryview:
        """The whole pool's bytes, block after block; for transports that register memory."""
        ...

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """Writable bytes of some layers of one page, `num_layers * layout.bytes_per_layer` long.

        The memory is the pool's own: only the page's one writer (DESIGN: who owns a page) may write it.
        """
        ...


class LoadedEngine(Protocol):
    """A model ready to run, and what its worker says of it."""

    @property
    def runner(self) -> Runner:
        """Computes steps."""
        ...

    @property
    def page_store(self) -> PageStore:
        """The KV pool that the runner works on."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of one sequence, prompt and output."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        ...

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ between models."""
        ...
