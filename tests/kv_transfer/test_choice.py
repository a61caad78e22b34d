"""Which transport two workers use, and what is said where there is none."""

import pytest

from baton.core.errors import TransferRefused
from baton.rpc.ticket import WorkerTransports
from kv_transfer.choice import Choice, choose


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


def test_nothing_in_common_is_refused_with_both_lists() -> None:
    with pytest.raises(TransferRefused, match="has nixl, the decode server has grpc"):
        choose(worker("nixl"), worker("grpc"), None)
