"""Pages through host memory, byte for byte."""

import pytest
import torch

from baton.engine.page_staging import PageStaging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 3), (1, 2)])
def test_pages_arrive_where_they_belong_and_nowhere_else(device, dtype, first_layer, num_layers):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(9, 3, 2, 2, 4, 8, generator=generator).to(dtype).to(device)
    target = torch.zeros_like(source)
    sender, receiver = PageStaging(source, 4), PageStaging(target, 4)
    layers = slice(first_layer, first_layer + num_layers)
    expected = torch.zeros_like(source)
    for ours, theirs in (([8, 0, 3], [1, 2, 7]), ([5], [0])):
        sent = sender.read(ours, first_layer, num_layers)
        assert bytes(sent) == source[ours, layers].cpu().view(torch.uint8).numpy().tobytes()
        receiver.buffer(len(theirs), num_layers)[:] = sent
        receiver.write(theirs, first_layer, num_layers)
        expected[theirs, layers] = source[ours, layers]
    assert torch.equal(target, expected)


@pytest.mark.gpu
def test_reads_what_steps_before_it_have_written(device):
    pool = torch.zeros(64, 4, 2, 8, 16, 128, dtype=torch.bfloat16, device=device)
    staging = PageStaging(pool, 64)
    for value in range(1, 6):
        pool.fill_(value)
        sent = staging.read(list(range(64)), 0, 4)
        values = torch.frombuffer(bytearray(sent), dtype=torch.bfloat16)
        assert bool((values == value).all())
