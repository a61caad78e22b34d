"""What the core and the services need from the parts that know tensors."""

from collections.abc import Callable
from typing import Protocol

from baton.core.grammar import Grammar
from baton.core.page_ports import PageStore
from baton.core.plan import StepPlan, StepResult

LayersDone = Callable[[int], None]


class SubmittedStep(Protocol):
    """A step that a runner has taken on."""

    def collect(self) -> StepResult:
        """Wait for the step's end; once for each step, in the order of submission.

        Raises what the step failed of. The step is over either way: its device has ended it too, and it
        writes to no page any more.
        """
        ...


class Runner(Protocol):
    """Computes steps, one after the other in the order of submission; knows tensors, not requests."""

    @property
    def depth(self) -> int:
        """Steps that may be submitted and not collected: 1, or 2 where one computes while the next one is
        prepared."""
        ...

    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> SubmittedStep:
        """Copy pages, write the rows' K and V into their pages, and sample what the plan asks for; nothing of
        `plan` is read after the return. Raises what it failed of, when nothing of the step runs any more.

        `layers_done`, if given, is told a few times before the return, on the same thread, before which layer
        the writing of all K and V is queued on the device; never for the last layer.

        A runner of depth 1 reads `plan`, computes and tells of layers in `collect`, at once after `submit`.
        """
        ...

    def idle(self) -> None:
        """There is nothing to compute until the next `submit`."""
        ...


class Grammars(Protocol):
    """Makes grammars of what requests carry; any thread."""

    def known(self, text: str) -> Grammar | None:
        """The grammar, if it is made already."""
        ...

    def compile(self, text: str) -> Grammar:
        """The grammar, which may take long. Raises InvalidRequest, which says what is wrong with the text."""
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
        """32 bytes that differ between models, the first 16 between their configurations."""
        ...

    @property
    def grammars(self) -> Grammars:
        """For its requests' `sampling.grammar`."""
        ...
