"""In which groups of layers a prompt's last pages leave."""

from types import SimpleNamespace

import pytest

from baton.core.kv_layout import KVLayout
from baton.engine.layer_groups import layer_group_ends

KIB = 1 << 10


@pytest.mark.parametrize(
    ("num_layers", "layer_kib", "ends"),
    [
        (8, 1024, {4, 6, 7}),
        (32, 1024, {16, 24, 28}),  # no more than four groups
        (7, 1024, {4, 6}),
        (2, 256, {1}),
        (2, 255, set()),  # not worth a message of its own
        (8, 128, {4, 6}),
        (1, 4096, set()),
        (8, 0, set()),  # nothing leaves
    ],
)
def test_each_group_has_half_of_the_layers_that_are_left(
    num_layers: int, layer_kib: int, ends: set[int]
) -> None:
    layout = KVLayout(16, num_layers, 1, 8, "float32")  # 1 KiB for each layer of a block
    assert layout.bytes_per_layer == KIB
    plan = SimpleNamespace(num_leaving_blocks=layer_kib)
    assert layer_group_ends(plan, layout) == ends  # type: ignore[arg-type]
