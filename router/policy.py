"""Which workers a request goes to: a pure function over what the router knows of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.kv_layout import KVLayout
from baton.core.request import LoadSnapshot


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One connected worker, at one moment."""

    index: int  # in the router's list of that role
    layout: KVLayout
    max_num_seqs: int
    max_model_len: int
    load: LoadSnapshot  # as the worker last said
    num_in_flight: int  # choices that this router has placed on it and that have not ended
    num_in_flight_tokens: int  # their prompts' tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one request runs, as indices into the router's lists."""

    prefill: int
    decode: int


def place(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> Placement | None:
    """The least loaded decode server, then the least loaded prefill server that it can take pages from.

    None where no two workers fit together.
    """
    for decode in sorted(decodes, key=_decode_load):
        partners = [prefill for prefill in prefills if prefill.layout.can_fill(decode.layout)]
        if partners:
            return Placement(min(partners, key=_prefill_load).index, decode.index)
    return None


def _decode_load(view: WorkerView) -> tuple[float, float, int]:
    """Share of its places taken, by this router's own count or, where other routers use it too, its own."""
    reported = view.load.num_running + view.load.num_waiting + view.load.num_reserved
    # A worker that says 0 of either is broken; that must not break the router.
    share_taken = max(view.num_in_flight, reported) / max(1, view.max_num_seqs)
    share_held = 1.0 - view.load.num_free_blocks / max(1, view.load.num_blocks)
    return (share_taken, share_held, view.index)


def _prefill_load(view: WorkerView) -> tuple[int, int, int]:
    """Prompt tokens under way; then what the worker says of requests from everybody."""
    return (view.num_in_flight_tokens, view.load.num_running + view.load.num_waiting, view.index)
