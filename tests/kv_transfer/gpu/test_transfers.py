"""Transfers between two processes, every byte compared on arrival; those that are marked, on a GPU."""

import pytest

for package in ("crc32c", "grpc_health", "grpc_reflection"):
    pytest.importorskip(package, reason="transfers need what Baton's servers do: pip install .")

from baton_kv_transfer.transports.nixl import library as nixl_library  # noqa: E402
from bench import page_to_page  # noqa: E402

NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(not nixl_library.is_available(), reason="NIXL is not installed")
)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["grpc", "cuda_ipc", NIXL])
def test_pages_of_one_gpu_arrive_byte_for_byte(transport: str) -> None:
    assert page_to_page.row(transport, 4, "cuda", checks=True)["MB"] == 134


def test_what_arrives_wrong_is_seen() -> None:
    """The check above: it finds one byte that is another, and nothing where there is none."""
    store = page_to_page.pool_of_pages("cpu")
    theirs, ours = (page_to_page.scattered(seed) for seed in (page_to_page.SOURCE_SEED, 0))
    for sent, block in zip(theirs, ours, strict=True):
        store.page(block, 0, page_to_page.LAYERS)[:] = bytes([sent % 256]) * store.layout.bytes_per_block
    owner = page_to_page.Owner(store, checks=True)
    owner.committed("0", {})
    store.page(ours[3], 2, 1)[77] ^= 1
    with pytest.raises(ValueError, match=f"page {ours[3]} is not what was sent"):
        owner.committed("0", {})
