"""Placement is a pure function: least loaded first, only among workers that fit together."""

from dataclasses import replace
from typing import Any

from baton.core.request import LoadSnapshot
from baton_router.workers.policy import Placement, WorkerView, place
from tests.services.fake_engine import fake_layout

IDLE = LoadSnapshot(0, 0, 0, 100, 100, 0, 0, 0)


def view(index: int = 0, **changes: Any) -> WorkerView:
    load = replace(IDLE, **{name: changes.pop(name) for name in list(changes) if hasattr(IDLE, name)})
    return replace(WorkerView(index, fake_layout(), 10, 512, load, 0, 0), **changes)


def test_no_worker_no_place() -> None:
    assert place([], [view()]) is None
    assert place([view()], []) is None


def test_the_decode_server_with_the_smallest_share_of_places_taken() -> None:
    decodes = [view(0, num_in_flight=5), view(1, num_in_flight=8, max_num_seqs=20), view(2, num_in_flight=6)]
    assert place([view()], decodes) == Placement(0, 1)


def test_requests_of_other_routers_count() -> None:
    decodes = [view(0, num_running=3, num_waiting=1, num_reserved=1), view(1, num_in_flight=4)]
    assert place([view()], decodes) == Placement(0, 1)


def test_between_equals_the_one_with_more_free_pages_then_the_first() -> None:
    assert place([view()], [view(0, num_free_blocks=10), view(1, num_free_blocks=50)]) == Placement(0, 1)
    assert place([view()], [view(1), view(0)]) == Placement(0, 0)


def test_the_prefill_server_with_the_fewest_prompt_tokens_under_way() -> None:
    prefills = [view(0, num_in_flight_tokens=900), view(1, num_in_flight=9, num_in_flight_tokens=800)]
    assert place(prefills, [view()]) == Placement(1, 0)
    busy_elsewhere = [view(0, num_waiting=2), view(1, num_running=1)]
    assert place(busy_elsewhere, [view()]) == Placement(1, 0)


def test_only_pages_that_can_be_converted_are_paired() -> None:
    assert place([view()], [view(0, layout=fake_layout(block_size=16))]) == Placement(0, 0)
    half = replace(fake_layout(), total_kv_heads=2)
    assert place([view(0, layout=half)], [view(0, layout=half)]) == Placement(0, 0)
    whole = replace(fake_layout(), num_kv_heads=2, total_kv_heads=2)
    assert place([view(0, layout=half)], [view(0, layout=whole)]) is None  # a head would be missing
    other = fake_layout(num_layers=3)
    assert place([view()], [view(0, layout=other)]) is None
    decodes = [view(0, layout=other), view(1, num_in_flight=9)]
    assert place([view()], decodes) == Placement(0, 1)
    assert place([view(0), view(1, layout=other)], decodes) == Placement(1, 0)


def both(index: int = 0, **changes: Any) -> WorkerView:
    """A worker of both roles, as it stands in both lists."""
    return view(index, has_both_roles=True, **changes)


def test_a_decode_server_of_both_roles_computes_its_prompts() -> None:
    assert place([both()], [both()]) == Placement(None, 0)
    assert place([view(0), both(1)], [both(0)]) == Placement(None, 0)
    assert place([], [both()]) == Placement(None, 0)


def test_the_least_loaded_decode_server_is_the_choice_whatever_its_roles() -> None:
    idle, busy = both(1), both(1, num_in_flight=5)
    assert place([view(0), idle], [view(0, num_in_flight=1), idle]) == Placement(None, 1)
    assert place([view(0), busy], [view(0, num_in_flight=1), busy]) == Placement(0, 0)


def test_a_server_of_prefill_alone_helps_where_prompts_wait() -> None:
    waiting = both(1, num_in_flight_tokens=500)
    assert place([view(0, num_in_flight_tokens=499), waiting], [waiting]) == Placement(0, 1)
    assert place([view(0, num_in_flight_tokens=500), waiting], [waiting]) == Placement(None, 1)
    misfit = view(0, layout=fake_layout(num_layers=3))
    assert place([misfit, waiting], [waiting]) == Placement(None, 1)


def test_nothing_travels_between_two_workers_of_both_roles() -> None:
    first, second = both(0, num_in_flight_tokens=500), both(1, num_in_flight=3)
    assert place([first, second], [first, second]) == Placement(None, 0)


def test_a_worker_of_both_roles_computes_prompts_for_a_decode_server() -> None:
    busy = both(1, num_in_flight=9, num_in_flight_tokens=10)
    assert place([view(0, num_in_flight_tokens=20), busy], [view(0), busy]) == Placement(1, 0)
    assert place([busy], [view(0), busy]) == Placement(1, 0)


def test_a_worker_that_reports_nonsense_breaks_nothing() -> None:
    broken = view(0, max_num_seqs=0, num_blocks=0, num_free_blocks=0)
    assert place([broken], [broken]) == Placement(0, 0)
