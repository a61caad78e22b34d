"""What measures handovers on a GPU, with a small model on the CPU: it runs, and counts what it should."""

import pytest

from baton.core.kv_layout import KVLayout
from bench.gpu_check import environment
from bench.gpu_transfers import handover_figures, prompts, servers
from bench.sessions import Timeline
from tests.bench.small_worker import SMALL

NUM_TOKENS = 600  # two chunks


@pytest.mark.parametrize("stand_ins", [(), ("crc32c", "grpc_health", "grpc_reflection")])
async def test_prompts_go_from_one_server_to_the_other(
    stand_ins: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment(stand_ins)["PYTHONPATH"])
    with servers("tests.bench.small_worker", "grpc") as processes:
        timelines = await prompts(processes, 2, NUM_TOKENS, SMALL.vocab_size)
    layout = KVLayout(16, SMALL.num_layers, SMALL.num_kv_heads, SMALL.head_dim, "bfloat16")
    for timeline in timelines:
        assert timeline.moved_bytes == layout.blocks_for(NUM_TOKENS) * layout.bytes_per_block
        assert timeline.asked < timeline.prefill_asked < timeline.prefill_ended < timeline.decode_started


def test_the_handover_is_what_lies_between_the_two_steps() -> None:
    millisecond = 1_000_000
    timelines = [
        Timeline(0, millisecond, 0, 21 * millisecond, (21 + waited) * millisecond, 5 * millisecond)
        for waited in (4, 12, 13)
    ]
    handover, prefill, moved = (figure.as_json() for figure in handover_figures("cuda_ipc", timelines))
    assert (handover["value"], handover["met"]) == (12.0, False)
    assert prefill["value"] == 20.0
    assert moved["value"] == 5.0
    assert next(iter(handover_figures("cuda_ipc", timelines[:1]))).as_json()["met"]
