"""Pages on a device to other memory and back, byte for byte; on a CPU the same code, kernels interpreted."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from crc32c import crc32c

from baton.core.kv_layout import KVLayout
from baton.engine.pages.page_staging import PageStaging
from tests.same_process_ipc import SameProcessIpc

RUNS = (([8, 0, 3], [1, 2, 7]), ([5], [0]))


def pool_of(seed, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 3, 2, 2, 4, 8, generator=generator).to(dtype).to(device)


def bytes_of(pool, blocks, layers):
    return pool[blocks, layers].cpu().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 3), (1, 2)])
def test_pages_arrive_where_they_belong_and_nowhere_else(device, dtype, first_layer, num_layers):
    source = pool_of(0, dtype, device)
    targets = [torch.zeros_like(source) for _ in range(3)]
    expected = torch.zeros_like(source)
    sender, receivers = PageStaging(source), [PageStaging(target) for target in targets]
    layers = slice(first_layer, first_layer + num_layers)
    for ours, theirs in RUNS:
        right = bytes_of(source, ours, layers)
        sent = sender.host_buffer(len(right))
        sender.read(ours, first_layer, num_layers, sent)
        assert bytes(sent) == right
        receivers[0].write(sent, theirs, first_layer, num_layers)
        buffer = sender.buffer(len(right))
        sender.gather(ours, first_layer, num_layers, buffer)
        assert bytes(sender.to_host(buffer)) == right
        receivers[1].scatter(buffer, theirs, first_layer, num_layers)
        elsewhere = bytearray(len(right))
        sender.read(ours, first_layer, num_layers, memoryview(elsewhere))
        receivers[2].write(memoryview(bytes(elsewhere)), theirs, first_layer, num_layers)
        expected[theirs, layers] = source[ours, layers]
    assert all(torch.equal(target, expected) for target in targets)


def test_checksums_are_those_of_the_bytes(device):
    source = pool_of(1, torch.bfloat16, device)
    staging = PageStaging(source)
    right = bytes_of(source, [4, 2], slice(1, 3))
    buffer = staging.buffer(len(right))
    staging.gather([4, 2], 1, 2, buffer)
    assert staging.checksum(buffer) == staging.pages_checksum([4, 2], 1, 2) == crc32c(right)


def test_another_process_pool_is_fetched_with_its_own_layout(device):
    """A pool of other blocks than ours, at an offset in its allocation."""
    theirs, ours = pool_of(2, torch.float32, device), torch.zeros(3, 2, 2, 1, 2, 4, device=device)
    ipc = SameProcessIpc()
    exported = PageStaging(theirs[2:], ipc).export()
    staging = PageStaging(ours, ipc)
    remote = staging.open(exported, KVLayout(4, 3, 2, 8, "float32"))
    right = bytes_of(theirs[2:], [6, 1], slice(1, 2))
    landing = staging.buffer(len(right))
    assert staging.fetch(remote, [6, 1], 1, 1, landing) == crc32c(right)
    assert bytes(staging.to_host(landing)) == right
    staging.close(remote)
    assert not ipc.opened


def test_threads_do_not_disturb_each_other(device):
    source = pool_of(3, torch.float32, device)
    staging = PageStaging(source)

    def read(block):
        target = staging.host_buffer(len(bytes_of(source, [block], slice(3))))
        staging.read([block], 0, 3, target)
        return bytes(target)

    with ThreadPoolExecutor(4) as threads:
        blocks = [index % 9 for index in range(24)]
        assert list(threads.map(read, blocks)) == [bytes_of(source, [block], slice(3)) for block in blocks]


@pytest.mark.gpu
def test_what_a_mark_has_seen_can_be_read(device):
    pool = torch.zeros(64, 4, 2, 8, 16, 128, dtype=torch.bfloat16, device=device)
    staging = PageStaging(pool)
    target = staging.host_buffer(pool.nbytes)
    for value in range(1, 6):
        for _ in range(50):
            pool.fill_(value - 1)
        pool.fill_(value)
        staging.mark().wait()
        staging.read(list(range(64)), 0, 4, target)
        assert bool((torch.frombuffer(target, dtype=torch.bfloat16) == value).all())


@pytest.mark.gpu
def test_a_step_does_not_wait_for_copies_nor_copies_for_a_step(device):
    """A step that spins on the device is still at it when a copy beside it has ended."""
    pool = torch.zeros(64, 4, 2, 8, 16, 128, dtype=torch.bfloat16, device=device)
    staging = PageStaging(pool)
    target = staging.host_buffer(pool.nbytes)
    staging.read(list(range(64)), 0, 4, target)
    torch.cuda._sleep(4_000_000_000)  # cycles: seconds
    step_ended = torch.cuda.Event()
    step_ended.record()
    staging.read(list(range(64)), 0, 4, target)
    assert not step_ended.query()
    step_ended.synchronize()
