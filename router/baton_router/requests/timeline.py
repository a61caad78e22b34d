"""What happened to one request, and when: a line of the log when it has ended. Pure: no I/O, no clock."""

from baton.core.transfer_stats import TransferReport


class Timeline:
    """Stamps in seconds of one monotonic clock; of several attempts the first ones count."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._stamps: dict[str, float] = {}  # in order of time
        self.transfer: TransferReport | None = None
        self.num_attempts = 0

    def stamp(self, what: str, now: float) -> None:
        """Something happened; only the first time counts."""
        self._stamps.setdefault(what, now)

    def text(self) -> str:
        """For people: milliseconds since the request was placed, and how its pages travelled."""
        parts = [f"{what} after {(when - self._began) * 1e3:.1f} ms" for what, when in self._stamps.items()]
        if self.num_attempts > 1:
            parts.append(f"{self.num_attempts} attempts")
        if (transfer := self.transfer) is not None:
            parts.append(
                f"{transfer.num_bytes / 1e6:.2f} MB of KV by {transfer.transport} in "
                f"{transfer.hidden_seconds * 1e3:.1f} ms while the prompt was computed and "
                f"{transfer.exposed_seconds * 1e3:.1f} ms after it"
            )
        return ", ".join(parts)
