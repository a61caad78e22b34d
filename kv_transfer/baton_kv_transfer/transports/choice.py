"""Which transport a pair of workers uses: the best that both have, unless one is asked for."""

from dataclasses import dataclass

from baton.core.errors import TransferRefused
from baton.core.ticket import WorkerTransports

# Best first. NIXL reads straight out of the other's memory; process groups need a copy into staging on
# either side; gRPC copies several times, but is always there.
PREFERENCE = ("nixl", "nccl", "grpc")
# From GPU to GPU of one host nothing has to pass through a library or the host's memory.
_BETWEEN_GPUS_OF_ONE_HOST = ("cuda_ipc", "nccl", "nixl", "grpc")


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
        if (obstacle := _obstacle(asked, mine, theirs)) is not None:
            raise TransferRefused("transport", f"transport {asked} was asked for, but {obstacle}")
        return Choice(asked, "it was asked for")
    shared = [name for name in _preference(mine, theirs) if name in mine.names and name in theirs.names]
    obstacles = {name: obstacle for name in shared if (obstacle := _obstacle(name, mine, theirs))}
    common = [name for name in shared if name not in obstacles]
    if not common:
        raise TransferRefused(
            "transport",
            f"no transport in common: this prefill server has {_listed(mine)}, "
            f"the decode server has {_listed(theirs)}{_but(obstacles)}",
        )
    left = [name for name in common if name not in failed] or common[-1:]
    place = "on one host" if _are_on_one_host(mine, theirs) else "between hosts"
    reason = f"the best of {', '.join(common)}, which both have, {place}{_but(obstacles)}"
    if len(left) < len(common):
        reason += f"; {', '.join(sorted(failed.intersection(common)))} failed lately"
    return Choice(left[0], reason)


def pair_device(mine: WorkerTransports, theirs: WorkerTransports) -> str:
    """Where a pair of process groups has its buffers: "cuda" between GPUs; "cpu" where either has none."""
    return "cuda" if mine.device == theirs.device == "cuda" else "cpu"


def _preference(mine: WorkerTransports, theirs: WorkerTransports) -> tuple[str, ...]:
    is_between_gpus = pair_device(mine, theirs) == "cuda" and _are_on_one_host(mine, theirs)
    return _BETWEEN_GPUS_OF_ONE_HOST if is_between_gpus else ("cuda_ipc", *PREFERENCE)


def _obstacle(name: str, mine: WorkerTransports, theirs: WorkerTransports) -> str | None:
    """Why two workers that both have a transport can't use it with each other; None if they can."""
    if name == "cuda_ipc" and not _are_on_one_host(mine, theirs):
        return "the two servers are not on one host"
    if name == "nccl" and mine.gpu_id and mine.gpu_id == theirs.gpu_id:
        return "NCCL does not connect two processes on one GPU"
    return None


def _but(obstacles: dict[str, str]) -> str:
    return "".join(f"; not {name}: {obstacle}" for name, obstacle in obstacles.items())


def _are_on_one_host(mine: WorkerTransports, theirs: WorkerTransports) -> bool:
    return bool(mine.host_id) and mine.host_id == theirs.host_id


def _require(name: str, worker: WorkerTransports, who: str) -> None:
    if name not in worker.names:
        raise TransferRefused(
            "transport", f"transport {name} was asked for, but {who} has only {_listed(worker)}"
        )


def _listed(worker: WorkerTransports) -> str:
    return ", ".join(worker.names) or "none"
