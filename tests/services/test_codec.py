"""What is put into a message comes out of it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.commands import FailureReason, StepTimes
from baton.core.kv_layout import DTYPE_BYTES, KVLayout
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest, LoadSnapshot, TokenEvent
from baton.core.sampling import SampledToken, SamplingParams
from baton.core.stopping import FinishReason
from baton.core.ticket import Ticket, WorkerTransports
from baton.core.transfer_stats import TransferStats, TransportStats
from baton.rpc import codec
from baton.v1 import transfer_pb2, worker_pb2

token_ids = st.integers(0, 2**32 - 1)
small = st.integers(1, 2**32 - 1)
floats32 = st.floats(-1e6, 0, width=32)

layouts = st.builds(KVLayout, small, small, small, small, st.sampled_from(sorted(DTYPE_BYTES)), small)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.001, 100),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(10, 2**31 - 1),
    min_tokens=st.integers(0, 10),
    stop_token_ids=st.lists(token_ids, max_size=5).map(tuple),
    logit_bias=st.lists(st.tuples(token_ids, st.floats(-100, 100)), max_size=5).map(tuple),
    num_logprobs=st.none() | st.integers(0, 20),
    n=st.integers(1, 128),
)
prompts = st.lists(token_ids, min_size=1, max_size=40).map(tuple)


@given(
    prompt=prompts,
    sampling=samplings,
    priority=st.integers(-(2**31), 2**31 - 1),
    number=st.integers(0, 2**64 - 1),
    answered=st.just(()) | prompts,
)
def test_work(
    prompt: tuple[int, ...],
    sampling: SamplingParams,
    priority: int,
    number: int,
    answered: tuple[int, ...],
) -> None:
    seed = chain_seed(b"model", "salt")
    if answered:
        sampling = replace(sampling, n=1)
    hashes = tuple(block_hashes(seed, (*prompt, *answered), 4))
    request = EngineRequest("id", prompt, seed, hashes, sampling, priority, answered)
    message = worker_pb2.Work.FromString(codec.work_to_proto(number, request).SerializeToString())
    assert message.number == number
    assert codec.work_from_proto(message, block_size=4) == request
    if request.num_tokens >= 4:
        message.block_hashes = message.block_hashes[:-1]
        with pytest.raises(ValueError, match="block hashes"):
            codec.work_from_proto(message, block_size=4)


def test_choices_do_not_go_on_after_one_answer() -> None:
    request = EngineRequest("id", (1,), b"", (), SamplingParams(n=2), answered_token_ids=(2,))
    with pytest.raises(ValueError, match="2 choices can't go on after the same answered tokens"):
        codec.work_from_proto(codec.work_to_proto(1, request), block_size=4)


@given(
    layout=layouts,
    transfer_id=st.binary(min_size=16, max_size=16),
    epoch=st.integers(0, 2**64 - 1),
    first_block=st.integers(0, 2**32 - 1),
    num_blocks=small,
    num_tokens=small,
)
def test_ticket(
    layout: KVLayout, transfer_id: bytes, epoch: int, first_block: int, num_blocks: int, num_tokens: int
) -> None:
    ticket = Ticket(
        transfer_id=transfer_id,
        epoch=epoch,
        request_id="request",
        address="unix:/tmp/x",
        first_block=first_block,
        num_blocks=num_blocks,
        layout=layout,
        protocol_version=2,
        num_tokens=num_tokens,
        transports=WorkerTransports("host", "cuda", ("grpc", "nixl"), "GPU-1"),
    )
    wire = codec.ticket_to_proto(ticket).SerializeToString()
    assert codec.ticket_from_proto(transfer_pb2.Ticket.FromString(wire)) == ticket


sampled = st.builds(
    SampledToken,
    token_ids,
    floats32,
    st.lists(st.tuples(token_ids, floats32), max_size=3).map(tuple),
) | st.builds(SampledToken, token_ids)
reasons = st.none() | st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])


@given(
    tokens=st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.integers(0, 3), sampled, reasons, st.integers(0, 100)),
        max_size=12,
    ),
    times=st.none() | st.builds(StepTimes, small, small),
)
def test_step(
    tokens: dict[tuple[int, int], tuple[int, SampledToken, FinishReason | None, int]], times: StepTimes | None
) -> None:
    """One step has at most one token of each choice."""
    load = codec.load_to_proto(LoadSnapshot(1, 2, 3, 4, 5, 6, 7, 8), TransferStats())
    output = codec.new_step_output(load, times)
    sent = []
    for (number, choice), (position, token, reason, num_cached) in tokens.items():
        is_first = position == 0 and choice == 0
        event = TokenEvent("", choice, position, token, reason, num_cached if is_first else 0)
        codec.add_token(output, number, event)
        sent.append((number, event))
    received = worker_pb2.StepOutput.FromString(output.SerializeToString())
    assert list(codec.tokens_from_proto(received)) == sent
    assert received.load == load
    assert (received.started_ns, received.ended_ns) == (
        (times.started_ns, times.ended_ns) if times else (0, 0)
    )


def test_load() -> None:
    stats = TransferStats(Counter(committed=10), delta_bytes_saved=12)
    stats.transports["grpc"] = TransportStats(9, 2, 3.0, 4.0, 5)
    load = codec.load_to_proto(LoadSnapshot(1, 2, 3, 4, 5, 6, 7, 8), stats)
    carried = worker_pb2.TransportLoad(
        name="grpc", bytes=9, num_transfers=2, seconds=3.0, exposed_seconds=4.0, num_operations=5
    )
    values = [getattr(load, field.name) for field in load.DESCRIPTOR.fields]
    assert values == [*range(1, 7), 9, {"committed": 10}, [carried], 12, 7, 8]


@pytest.mark.parametrize("reason", FailureReason)
def test_failure(reason: FailureReason) -> None:
    failed = codec.failure_to_proto(3, reason, "why").failed
    assert (failed.number, failed.message, codec.failure_reason_from_proto(failed)) == (3, "why", reason)
    unknown = worker_pb2.Failed(reason=99)  # type: ignore[arg-type]
    assert codec.failure_reason_from_proto(unknown) is FailureReason.INTERNAL


def test_arrays_of_unequal_length_are_an_error() -> None:
    output = worker_pb2.StepOutput(numbers=[1, 2], choices=[0], positions=[0], token_ids=[5])
    with pytest.raises(ValueError, match="zip"):
        list(codec.tokens_from_proto(output))


def test_scales_of_a_layout_travel() -> None:
    layout = KVLayout(1, 2, 3, 4, "float8_e4m3fn", scales=(0.5, 1.0, 0.25, 3.0))
    assert codec.layout_from_proto(codec.layout_to_proto(layout)) == layout


@pytest.mark.parametrize("field", ["block_size", "num_layers", "num_kv_heads", "head_dim", "version"])
def test_every_number_of_a_layout_travels(field: str) -> None:
    changed: dict[str, Any] = {field: 77}
    layout = replace(KVLayout(1, 2, 3, 4, "float16"), **changed)
    assert codec.layout_from_proto(codec.layout_to_proto(layout)) == layout
