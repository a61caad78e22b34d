"""Which transport a pair of workers uses: the best that both have, unless one is asked for."""

from dataclasses import dataclass

from baton.core.errors import TransferRefused
from baton.core.ticket import WorkerTransports
from baton_kv_transfer.transports.registry import preference, row_of


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and why it was chosen."""

    name: str
    reason: str


def choose(
    mine: WorkerTransports, theirs: WorkerTransports, asked: str | None, failed: frozenset[str] = frozenset()
) -> Choice:
    """The transport for transfers to a worker that has `theirs`; `asked` forces one.

    Those that have `failed` lately are left out, but for the last that there is. Raises TransferRefused
    where the one that is asked for is missing on either side, or there is none in common.
    """
    if asked is not None:
        _require(asked, mine, "this prefill server")
        _require(asked, theirs, "the decode server")
        if (obstacle := row_of(asked).load().obstacle(mine, theirs)) is not None:
            raise TransferRefused("transport", f"transport {asked} was asked for, but {obstacle}")
        return Choice(asked, "it was asked for")
    is_on_one_host = mine.is_on_host_of(theirs)
    between_gpus = is_on_one_host and mine.device == theirs.device == "cuda"
    both = set(mine.names).intersection(theirs.names)
    shared = [row for row in preference(between_gpus=between_gpus) if row.name in both]
    obstacles = {row.name: obstacle for row in shared if (obstacle := row.load().obstacle(mine, theirs))}
    common = [row.name for row in shared if row.name not in obstacles]
    if not common:
        raise TransferRefused(
            "transport",
            f"no transport in common: this prefill server has {_listed(mine)}, "
            f"the decode server has {_listed(theirs)}{_but(obstacles)}",
        )
    left = [name for name in common if name not in failed] or common[-1:]
    place = "on one host" if is_on_one_host else "between hosts"
    reason = f"the best of {', '.join(common)}, which both have, {place}{_but(obstacles)}"
    if len(left) < len(common):
        reason += f"; {', '.join(sorted(failed.intersection(common)))} failed lately"
    return Choice(left[0], reason)


def _but(obstacles: dict[str, str]) -> str:
    return "".join(f"; not {name}: {obstacle}" for name, obstacle in obstacles.items())


def _require(name: str, worker: WorkerTransports, who: str) -> None:
    if name not in worker.names:
        raise TransferRefused(
            "transport", f"transport {name} was asked for, but {who} has only {_listed(worker)}"
        )


def _listed(worker: WorkerTransports) -> str:
    return ", ".join(worker.names) or "none"
