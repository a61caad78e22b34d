"""What the event loop asks of the engine's thread, and what comes back."""

from dataclasses import dataclass, field
from enum import Enum

from baton.core.page_ports import Mark
from baton.core.request import (
    BlocksReserved,
    EngineRequest,
    LoadSnapshot,
    PagesReady,
    PromptLogprobs,
    TokenEvent,
)


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Compute a request here; see Scheduler.add."""

    request: EngineRequest
    hands_over: bool = False
    export_from: int | None = None


@dataclass(frozen=True, slots=True)
class ReserveBlocks:
    """Take pages for a request whose KV will arrive; answered by BlocksReserved when there are some."""

    request: EngineRequest


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """The reserved pages are filled: decode from here; see Scheduler.commit."""

    request_id: str
    first_tokens: dict[int, int]


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Forget a request, or only one of its choices."""

    request_id: str
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class ReleasePages:
    """A transfer is done with exported pages."""

    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Find nothing again of what was computed so far."""


EngineCommand = AddRequest | ReserveBlocks | CommitRequest | AbortRequest | ReleasePages | ResetPrefixCache


class FailureReason(Enum):
    """Why a worker gave up on a request."""

    INTERNAL = "internal"
    INVALID = "invalid"
    OVERLOADED = "overloaded"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """The engine gave up on one request."""

    request_id: str
    reason: FailureReason
    message: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step ran, in nanoseconds of the machine's monotonic clock."""

    started_ns: int
    ended_ns: int


@dataclass(slots=True)
class EngineOutput:
    """All that happened since the last one; `load` is always there, `times` after a step."""

    load: LoadSnapshot
    times: StepTimes | None = None
    tokens: list[TokenEvent] = field(default_factory=list)
    pages: list[PagesReady] = field(default_factory=list)
    reserved: list[BlocksReserved] = field(default_factory=list)
    failures: list[RequestFailure] = field(default_factory=list)
    prompts: list[PromptLogprobs] = field(default_factory=list)  # before the tokens
    is_within_step: bool = False  # only `pages` are new: the step goes on
    mark: Mark | None = None  # what is said of `pages` comes true on the device when this is reached
