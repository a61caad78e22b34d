"""Which workers a request goes to: a pure function over what the router knows of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.kv_layout import KVLayout
from baton.core.request import LoadSnapshot


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One connected worker, at one moment."""

    index: int  # in the router's list of that role; those of both roles are in both lists
    layout: KVLayout
    max_num_seqs: int
    max_model_len: int
    load: LoadSnapshot  # as the worker last said
    num_in_flight: int  # choices that this router has placed on it and that have not ended
    num_in_flight_tokens: int  # of prompts that this router has placed on it and that are not computed
    has_both_roles: bool = False
    features: frozenset[str] = frozenset()  # that it knows


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one request runs, as indices into the router's lists."""

    prefill: int | None  # None: the decode server computes the prompt itself, and nothing travels
    decode: int


def place(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> Placement | None:
    """The least loaded decode server, then the least loaded prefill server that it can take pages from.

    A decode server that takes prompts too computes this one itself, unless more prompt tokens wait there
    than on some server of prefill alone. Between two workers of both roles nothing travels: each has its
    own prompts, and pages that wait on one another in a circle would wait for ever. None where no two
    workers fit together.
    """
    for decode in sorted(decodes, key=_decode_load):
        partners = [prefill for prefill in prefills if prefill.layout.can_fill(decode.layout)]
        if decode.has_both_roles:
            partners = [prefill for prefill in partners if _is_relief(prefill, decode)]
        if partners:
            return Placement(min(partners, key=_prefill_load).index, decode.index)
        if decode.has_both_roles:
            return Placement(None, decode.index)
    return None


def _is_relief(prefill: WorkerView, decode: WorkerView) -> bool:
    """Whether a prompt is worth computing there rather than where it will be decoded."""
    return not prefill.has_both_roles and prefill.num_in_flight_tokens < decode.num_in_flight_tokens


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
