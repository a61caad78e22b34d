"""Which transport a pair of workers uses: the best that both have, unless one is asked for."""

from dataclasses import dataclass

from baton.core.errors import TransferRefused
from baton.rpc.ticket import WorkerTransports

# Best first. NIXL reads straight out of the other's memory; process groups need a copy into staging on
# either side; gRPC copies several times, but is always there.
PREFERENCE = ("nixl", "nccl", "grpc")


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and why it was chosen."""

    name: str
    reason: str


def choose(
    mine: WorkerTransports, theirs: WorkerTransports, asked: str | None, failed: frozenset[str] = frozenset()
) -> Choice:
    """The transport for transfers to a worker that has `theirs`; `asked` forces one.

    Those that have `failed` lately are left out, but for gRPC, the last that there is. Raises TransferRefused
    where the one that is asked for is missing on either side, or there is none in common.
    """
    if asked is not None:
        _require(asked, mine, "this prefill server")
        _require(asked, theirs, "the decode server")
        return Choice(asked, "it was asked for")
    common = [name for name in PREFERENCE if name in mine.names and name in theirs.names]
    if not common:
        raise TransferRefused(
            "transport",
            f"no transport in common: this prefill server has {_listed(mine)}, "
            f"the decode server has {_listed(theirs)}",
        )
    left = [name for name in common if name not in failed] or common[-1:]
    place = "on one host" if mine.host_id and mine.host_id == theirs.host_id else "between hosts"
    reason = f"the best of {', '.join(common)}, which both have, {place}"
    if len(left) < len(common):
        reason += f"; {', '.join(sorted(failed.intersection(common)))} failed lately"
    return Choice(left[0], reason)


def _require(name: str, worker: WorkerTransports, who: str) -> None:
    if name not in worker.names:
        raise TransferRefused(
            "transport", f"transport {name} was asked for, but {who} has only {_listed(worker)}"
        )


def _listed(worker: WorkerTransports) -> str:
    return ", ".join(worker.names) or "none"
