"""Page copies that the next step has to make (copy on write), and the holds that keep them safe."""

from collections.abc import Sequence

from baton.core.block_pool import BlockPool


class PageCopies:
    """Copies asked for and not yet made.

    Both pages of a copy are held until it is made: the source might else be given to somebody who writes
    it first, and the destination to somebody whose data the copy would overwrite.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pending: list[tuple[int, int]] = []

    def add(self, source: int, destination: int) -> None:
        """Copy `source` to `destination` at the beginning of the next step."""
        self._pool.acquire((source, destination))
        self._pending.append((source, destination))

    def cancel(self, destinations: Sequence[int]) -> None:
        """The owner of `destinations` gives them up: what was to be copied there is not wanted any more."""
        kept = []
        for source, destination in self._pending:
            if destination in destinations:
                self._pool.release((source, destination))
            else:
                kept.append((source, destination))
        self._pending = kept

    def take(self) -> tuple[tuple[int, int], ...]:
        """The copies for the step being planned; they stay held until `done` or `retry`."""
        copies = tuple(self._pending)
        self._pending = []
        return copies

    def done(self, copies: tuple[tuple[int, int], ...]) -> None:
        """The step that made `copies` is over."""
        for source, destination in copies:
            self._pool.release((source, destination))

    def retry(self, copies: tuple[tuple[int, int], ...]) -> None:
        """The step that was to make `copies` failed: the next one makes them."""
        self._pending = [*copies, *self._pending]
