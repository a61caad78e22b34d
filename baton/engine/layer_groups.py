"""When the pages that a step completes leave, while it goes on."""

from baton.core.kv_layout import KVLayout
from baton.core.plan import StepPlan

# The pages that a prompt's last step completes leave in groups of layers while it goes on: more groups leave
# less to wait for, and cost a message or more each.
_MAX_LAYER_GROUPS = 4
_MIN_GROUP_BYTES = 256 << 10


def layer_group_ends(plan: StepPlan, layout: KVLayout) -> set[int]:
    """Layers before which a step's pages leave in groups; the last group's end is not among them.

    Each group has half of the layers that are left: a request waits for the last one alone.
    """
    ends: set[int] = set()
    num_left = layout.num_layers
    while len(ends) < _MAX_LAYER_GROUPS - 1:
        num_left //= 2
        if num_left * plan.num_leaving_blocks * layout.bytes_per_layer < _MIN_GROUP_BYTES or not num_left:
            break
        ends.add(layout.num_layers - num_left)
    return ends
