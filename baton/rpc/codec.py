"""Protobuf to dataclasses and back: the one place that knows both."""

from collections.abc import Iterable
from typing import Any

from baton.core.commands import FailureReason, StepTimes
from baton.core.fields import Row, TokenBiases, TokenIds, TokenSequences, rows
from baton.core.kv_layout import KVLayout
from baton.core.prefix import HASH_BYTES, pack_token_ids, unpack_token_ids
from baton.core.request import EngineRequest, LoadSnapshot, PromptLogprobs, TokenEvent
from baton.core.sampling import SampledToken, SamplingParams
from baton.core.stopping import FinishReason
from baton.core.ticket import Ticket, WorkerTransports
from baton.core.transfer_stats import TransferReport, TransferStats
from baton.v1 import transfer_pb2, worker_pb2

PROTOCOL_VERSION = 2  # docs/kv-transfer.md: versions

_FINISH_TO_PROTO = {
    FinishReason.STOP: worker_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PROTO = {value: reason for reason, value in _FINISH_TO_PROTO.items()}

_FAILURE_TO_PROTO = {
    FailureReason.INTERNAL: worker_pb2.Failed.REASON_INTERNAL,
    FailureReason.INVALID: worker_pb2.Failed.REASON_INVALID,
    FailureReason.OVERLOADED: worker_pb2.Failed.REASON_OVERLOADED,
    FailureReason.TRANSFER: worker_pb2.Failed.REASON_TRANSFER,
}
_FAILURE_FROM_PROTO = {value: reason for reason, value in _FAILURE_TO_PROTO.items()}


def work_to_proto(number: int, request: EngineRequest) -> worker_pb2.Work:
    """One request under the session's short name for it."""
    return worker_pb2.Work(
        number=number,
        request_id=request.request_id,
        token_ids=pack_token_ids(request.prompt_token_ids),
        hash_seed=request.hash_seed,
        block_hashes=b"".join(request.block_hashes),
        sampling=_sampling_to_proto(request.sampling),
        priority=request.priority,
        answered_token_ids=pack_token_ids(request.answered_token_ids),
    )


def work_from_proto(work: worker_pb2.Work, block_size: int) -> EngineRequest:
    """Raises ValueError or InvalidRequest where the message does not hold together."""
    hashes = work.block_hashes
    request = EngineRequest(
        request_id=work.request_id,
        prompt_token_ids=tuple(unpack_token_ids(work.token_ids)),
        hash_seed=work.hash_seed,
        block_hashes=tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)),
        sampling=_sampling_from_proto(work.sampling),
        priority=work.priority,
        answered_token_ids=tuple(unpack_token_ids(work.answered_token_ids)),
    )
    if len(hashes) != request.num_tokens // block_size * HASH_BYTES:
        raise ValueError(
            f"{len(hashes)} bytes of block hashes for {request.num_tokens} tokens in blocks of {block_size}"
        )
    if request.answered_token_ids and request.sampling.n > 1:
        raise ValueError(f"{request.sampling.n} choices can't go on after the same answered tokens")
    return request


def _sampling_to_proto(params: SamplingParams) -> worker_pb2.WorkerSampling:
    fields = {row.name: _to_field(row, getattr(params, row.name)) for row in rows(SamplingParams)}
    return worker_pb2.WorkerSampling(**fields)


def _sampling_from_proto(message: worker_pb2.WorkerSampling) -> SamplingParams:
    sent = {field.name: value for field, value in message.ListFields()}
    return SamplingParams(
        **{row.name: _from_field(row, sent[row.name]) for row in rows(SamplingParams) if row.name in sent}
    )


def _to_field(row: Row, value: Any) -> Any:
    if row.type == TokenBiases:
        return [worker_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in value]
    if row.type == TokenSequences:
        return [worker_pb2.TokenIdList(ids=ids) for ids in value]
    if row.type == TokenIds | None:
        return None if value is None else worker_pb2.TokenIdList(ids=value)
    return value


def _from_field(row: Row, value: Any) -> Any:
    if row.type == TokenBiases:
        return tuple((entry.token_id, entry.bias) for entry in value)
    if row.type == TokenSequences:
        return tuple(tuple(entry.ids) for entry in value)
    if row.type == TokenIds | None:
        return tuple(value.ids)
    return tuple(value) if row.type == TokenIds else value


def layout_to_proto(layout: KVLayout) -> transfer_pb2.KVLayout:
    """Shape of a page."""
    return transfer_pb2.KVLayout(
        version=layout.version,
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        first_kv_head=layout.first_kv_head,
        total_kv_heads=layout.total_kv_heads,
        scales=layout.scales,
    )


def layout_from_proto(message: transfer_pb2.KVLayout) -> KVLayout:
    """Shape of a page."""
    return KVLayout(
        version=message.version,
        block_size=message.block_size,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        dtype=message.dtype,
        first_kv_head=message.first_kv_head,
        total_kv_heads=message.total_kv_heads,
        scales=tuple(message.scales),
    )


def ticket_to_proto(ticket: Ticket) -> transfer_pb2.Ticket:
    """The right to fill one reservation's pages."""
    return transfer_pb2.Ticket(
        transfer_id=ticket.transfer_id,
        epoch=ticket.epoch,
        request_id=ticket.request_id,
        address=ticket.address,
        first_block=ticket.first_block,
        num_blocks=ticket.num_blocks,
        layout=layout_to_proto(ticket.layout),
        protocol_version=ticket.protocol_version,
        num_tokens=ticket.num_tokens,
        transports=transfer_pb2.WorkerTransports(
            host_id=ticket.transports.host_id,
            device=ticket.transports.device,
            names=ticket.transports.names,
            gpu_id=ticket.transports.gpu_id,
        ),
    )


def ticket_from_proto(message: transfer_pb2.Ticket) -> Ticket:
    """The right to fill one reservation's pages."""
    offer = message.transports
    return Ticket(
        transfer_id=message.transfer_id,
        epoch=message.epoch,
        request_id=message.request_id,
        address=message.address,
        first_block=message.first_block,
        num_blocks=message.num_blocks,
        layout=layout_from_proto(message.layout),
        protocol_version=message.protocol_version,
        num_tokens=message.num_tokens,
        transports=WorkerTransports(offer.host_id, offer.device, tuple(offer.names), offer.gpu_id),
    )


def load_to_proto(load: LoadSnapshot, stats: TransferStats) -> worker_pb2.Load:
    """A worker's load, and what its KV transfers did."""
    return worker_pb2.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_reserved=load.num_reserved,
        num_blocks=load.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_preemptions=load.num_preemptions,
        prefix_cache_queries=load.prefix_cache_queries,
        prefix_cache_hits=load.prefix_cache_hits,
        transfer_bytes=stats.num_bytes,
        transfers=stats.outcomes,
        transports=[
            worker_pb2.TransportLoad(
                name=name,
                bytes=transport.num_bytes,
                num_transfers=transport.num_transfers,
                seconds=transport.seconds,
                exposed_seconds=transport.exposed_seconds,
                num_operations=transport.num_operations,
            )
            for name, transport in stats.transports.items()
        ],
        delta_bytes_saved=stats.delta_bytes_saved,
    )


def load_from_proto(load: worker_pb2.Load) -> LoadSnapshot:
    """A worker's load, less what its transfers did."""
    return LoadSnapshot(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_reserved=load.num_reserved,
        num_blocks=load.num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_preemptions=load.num_preemptions,
        prefix_cache_queries=load.prefix_cache_queries,
        prefix_cache_hits=load.prefix_cache_hits,
    )


def new_step_output(load: worker_pb2.Load, times: StepTimes | None) -> worker_pb2.StepOutput:
    """A step's message before its tokens."""
    if times is None:
        return worker_pb2.StepOutput(load=load)
    return worker_pb2.StepOutput(load=load, started_ns=times.started_ns, ended_ns=times.ended_ns)


def add_token(output: worker_pb2.StepOutput, number: int, event: TokenEvent) -> None:
    """Append one sampled token to a step's message."""
    entry = len(output.token_ids)
    output.numbers.append(number)
    output.choices.append(event.choice)
    output.positions.append(event.position)
    output.token_ids.append(event.token.token_id)
    if event.token.logprob is not None:
        output.logprobs.add(
            entry=entry,
            logprob=event.token.logprob,
            top_token_ids=[token_id for token_id, _ in event.token.top_logprobs],
            top_logprobs=[logprob for _, logprob in event.token.top_logprobs],
        )
    if event.finish_reason is not None:
        output.finished.add(number=number, choice=event.choice, reason=_FINISH_TO_PROTO[event.finish_reason])
    if event.num_cached_prompt_tokens:
        output.cached_tokens.add(number=number, num_tokens=event.num_cached_prompt_tokens)


def add_prompt_logprobs(output: worker_pb2.StepOutput, number: int, event: PromptLogprobs) -> None:
    """Append the log probabilities of some of a prompt's tokens to a step's message."""
    output.prompts.add(
        number=number,
        first_position=event.first_position,
        token_ids=[token.token_id for token in event.tokens],
        logprobs=[token.logprob or 0.0 for token in event.tokens],
        num_top=len(event.tokens[0].top_logprobs),
        top_token_ids=[token_id for token in event.tokens for token_id, _ in token.top_logprobs],
        top_logprobs=[logprob for token in event.tokens for _, logprob in token.top_logprobs],
    )


def prompt_logprobs_from_proto(
    output: worker_pb2.StepOutput,
) -> Iterable[tuple[int, PromptLogprobs]]:
    """(number, log probabilities) of every prompt in a step's message; request ids stay empty."""
    for message in output.prompts:
        top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
        tokens = tuple(
            SampledToken(token_id, logprob, top[index * message.num_top : (index + 1) * message.num_top])
            for index, (token_id, logprob) in enumerate(zip(message.token_ids, message.logprobs, strict=True))
        )
        yield message.number, PromptLogprobs("", message.first_position, tokens)


def tokens_from_proto(output: worker_pb2.StepOutput) -> Iterable[tuple[int, TokenEvent]]:
    """(number, token) of every entry of a step's message; request ids are not in it and stay empty."""
    logprobs = {message.entry: message for message in output.logprobs}
    finished = {
        (message.number, message.choice): _FINISH_FROM_PROTO.get(message.reason)
        for message in output.finished
    }
    cached = {message.number: message.num_tokens for message in output.cached_tokens}
    entries = zip(output.numbers, output.choices, output.positions, output.token_ids, strict=True)
    for entry, (number, choice, position, token_id) in enumerate(entries):
        token = SampledToken(token_id)
        if (message := logprobs.get(entry)) is not None:
            top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
            token = SampledToken(token_id, message.logprob, top)
        reason = finished.get((number, choice))
        num_cached = cached.get(number, 0) if position == 0 and choice == 0 else 0
        yield number, TokenEvent("", choice, position, token, reason, num_cached)


def failure_to_proto(number: int, reason: FailureReason, message: str) -> worker_pb2.Event:
    """The worker gave up on a request."""
    failed = worker_pb2.Failed(number=number, reason=_FAILURE_TO_PROTO[reason], message=message)
    return worker_pb2.Event(failed=failed)


def report_to_proto(number: int, report: TransferReport) -> worker_pb2.Event:
    """A request's pages are with the decode server."""
    transferred = worker_pb2.Transferred(
        number=number,
        transport=report.transport,
        bytes=report.num_bytes,
        seconds=report.seconds,
        exposed_seconds=report.exposed_seconds,
    )
    return worker_pb2.Event(transferred=transferred)


def report_from_proto(message: worker_pb2.Transferred) -> TransferReport:
    """What prefill says of a transfer."""
    return TransferReport(message.transport, message.bytes, message.seconds, message.exposed_seconds)


def failure_reason_from_proto(failed: worker_pb2.Failed) -> FailureReason:
    """Why the worker gave up."""
    return _FAILURE_FROM_PROTO.get(failed.reason, FailureReason.INTERNAL)
