"""What happened to transfers, counted; shown in the router's metrics through each worker's load."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class TransferStats:
    """Totals since the worker's start."""

    num_bytes: int = 0  # KV bytes sent or received
    outcomes: Counter[str] = field(default_factory=Counter)  # "committed", "aborted", or why it was refused
