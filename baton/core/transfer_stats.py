"""What happened to a worker's KV transfers, counted; routers show it in their metrics."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TransferReport:
    """One request's transfer, as its prefill server saw it."""

    transport: str  # for people: what carried it
    num_bytes: int
    seconds: float  # from the first page to the acknowledgement
    exposed_seconds: float  # part of it that came after the prompt was computed

    @property
    def hidden_seconds(self) -> float:
        """Part of it while the prompt was still computing."""
        return self.seconds - self.exposed_seconds


@dataclass(slots=True)
class TransportStats:
    """What one transport has carried since the worker's start."""

    num_bytes: int = 0  # KV bytes sent or received
    num_transfers: int = 0  # that came to an end, whichever
    seconds: float = 0.0  # from a transfer's first page to its acknowledgement, summed; only prefill knows
    exposed_seconds: float = 0.0  # part of it that came after the prompt was computed
    num_operations: int = 0  # frames, messages or descriptors


@dataclass(slots=True)
class TransferStats:
    """Totals since the worker's start."""

    outcomes: Counter[str] = field(default_factory=Counter)  # "committed", "aborted", or why it was refused
    transports: defaultdict[str, TransportStats] = field(default_factory=lambda: defaultdict(TransportStats))
    delta_bytes_saved: int = 0  # of prompts, that decode's prefix cache held and that did not travel

    @property
    def num_bytes(self) -> int:
        """KV bytes sent or received."""
        return sum(transport.num_bytes for transport in self.transports.values())
