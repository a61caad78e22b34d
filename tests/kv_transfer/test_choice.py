"""Which transport two workers use, and what is said where there is none."""

import pytest

from baton.core.errors import TransferRefused
from baton.core.ticket import WorkerTransports
from baton_kv_transfer.transports.choice import Choice, choose
from baton_kv_transfer.transports.pair.transport import pair_device


def worker(*names: str, host: str = "here") -> WorkerTransports:
    return WorkerTransports(host, "cpu", names)


@pytest.mark.parametrize(
    ("mine", "theirs", "chosen"),
    [
        (("grpc",), ("grpc", "nccl", "nixl"), "grpc"),
        (("grpc", "nccl"), ("nccl", "grpc", "nixl"), "nccl"),
        (("nixl", "nccl", "grpc"), ("grpc", "nccl", "nixl"), "nixl"),
    ],
)
def test_the_best_that_both_have(mine: tuple[str, ...], theirs: tuple[str, ...], chosen: str) -> None:
    choice = choose(worker(*mine), worker(*theirs), None)
    assert choice.name == chosen
    assert choice.reason.endswith("which both have, on one host")
    assert choose(worker(*mine), worker(*theirs, host="there"), None).reason.endswith("between hosts")


def test_what_failed_lately_is_left_out_but_for_the_last() -> None:
    both = worker("grpc", "nccl", "nixl")
    choice = choose(both, both, None, frozenset({"nixl"}))
    assert choice.name == "nccl"
    assert choice.reason.endswith("nixl failed lately")
    assert choose(both, both, None, frozenset({"nixl", "nccl", "grpc"})).name == "grpc"


def test_what_is_asked_for_is_used_or_refused() -> None:
    both = worker("grpc", "nccl", "nixl")
    assert choose(both, both, "grpc") == Choice("grpc", "it was asked for")
    assert choose(both, both, "nixl", frozenset({"nixl"})).name == "nixl"
    with pytest.raises(TransferRefused, match="nixl was asked for, but this prefill server has only grpc"):
        choose(worker("grpc"), both, "nixl")
    with pytest.raises(
        TransferRefused, match="nccl was asked for, but the decode server has only grpc, nixl"
    ):
        choose(both, worker("grpc", "nixl"), "nccl")


def gpu_worker(gpu_id: str, *names: str, host: str = "here") -> WorkerTransports:
    return WorkerTransports(host, "cuda", names, gpu_id)


ALL = ("grpc", "nccl", "nixl", "cuda_ipc")


@pytest.mark.parametrize(
    ("mine", "theirs", "order"),
    [
        (gpu_worker("A", *ALL), gpu_worker("B", *ALL), ["cuda_ipc", "nccl", "nixl", "grpc"]),
        (gpu_worker("A", *ALL), gpu_worker("A", *ALL), ["cuda_ipc", "nixl", "grpc"]),
        (gpu_worker("A", *ALL), gpu_worker("B", *ALL, host="there"), ["nixl", "nccl", "grpc"]),
        (gpu_worker("A", *ALL), worker("grpc", "nccl", "nixl"), ["nixl", "nccl", "grpc"]),
    ],
    ids=["two GPUs", "one GPU", "two hosts", "one has no GPU"],
)
def test_between_gpus(mine: WorkerTransports, theirs: WorkerTransports, order: list[str]) -> None:
    """The best one, and what is left when those before it have failed."""
    for index, name in enumerate(order):
        assert choose(mine, theirs, None, frozenset(order[:index])).name == name


def test_why_a_transport_that_both_have_is_not_used_is_said() -> None:
    one = gpu_worker("A", *ALL)
    assert "; not nccl: NCCL does not connect two processes on one GPU" in choose(one, one, None).reason
    with pytest.raises(TransferRefused, match="nccl was asked for, but NCCL does not connect two processes"):
        choose(one, one, "nccl")
    far = gpu_worker("A", *ALL, host="there")
    with pytest.raises(TransferRefused, match="cuda_ipc was asked for, but the two servers are not on one"):
        choose(one, far, "cuda_ipc")
    nowhere = gpu_worker("B", "grpc", "cuda_ipc", host="")
    assert choose(nowhere, nowhere, None).name == "grpc"


def test_pairs_between_gpus_only_where_both_have_one() -> None:
    assert pair_device("cuda", "cuda") == "cuda"
    assert pair_device("cuda", "cpu") == pair_device("cpu", "cuda") == pair_device("cpu", "cpu") == "cpu"


def test_nothing_in_common_is_refused_with_both_lists() -> None:
    with pytest.raises(TransferRefused, match="has nixl, the decode server has grpc"):
        choose(worker("nixl"), worker("grpc"), None)
