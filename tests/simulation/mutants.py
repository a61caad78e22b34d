"""Bugs put into production code on purpose: the simulator has to find each of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from baton.core.errors import TransferRefused
from baton.core.request import BlocksReserved
from baton.core.reservation import (
    FramePlace,
    Reservation,
    ReservationTable,
    TransferState,
    _Writer,
)
from baton.core.sequence_pages import SequencePages
from baton_decode_service.handover import DecodeHandover
from baton_kv_transfer.pages.convert import PageConverter
from baton_kv_transfer.pages.frames import PagesToSend
from baton_kv_transfer.transfers import inbound
from baton_kv_transfer.transfers.inbound import InboundTransfers
from baton_kv_transfer.transfers.outbound import OutboundTransfer
from baton_prefill_service.handover import PrefillHandover

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """One bug."""

    what: str
    put_in: Callable[[Patch], None]


def _nothing(*_: object, **__: Any) -> None:
    """Instead of what should be done."""


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, function)


# --- receiving ------------------------------------------------------------------------------------------


def _accept_in_any_state(self: Reservation, writer: int, place: FramePlace, now: float) -> None:
    self._writers[writer].take(place)
    self._num_writes += 1
    self._touch(now)


def _find_whatever_the_epoch(self: ReservationTable, transfer_id: bytes, epoch: int) -> Reservation:
    reservation = self._by_transfer.get(transfer_id)
    if reservation is None:
        raise TransferRefused("ticket", "no such ticket")
    return reservation


def _take_twice(self: _Writer, place: FramePlace) -> None:
    self._require_inside(place)
    self.num_missing -= place.num_layers * place.num_blocks


def _commit_incomplete(self: Reservation, now: float, *, may_wait: bool) -> None:
    self._require_receiving("commit")
    self.state = TransferState.COMMITTED


def _settle_before_commit(self: Reservation) -> None:
    if self.state is TransferState.RECEIVING and not self._num_missing:
        self.state = TransferState.COMMITTED


def _commit_beside_copies(self: Reservation) -> None:
    if self.state is TransferState.RECEIVING and self._is_commit_asked and not self._num_missing:
        self.state = TransferState.COMMITTED


def _drain_beside_copies(self: Reservation) -> None:
    if self.state is TransferState.ABORTING and self._num_calls == 0:
        self.state = TransferState.DRAINED


def _abort_at_once(self: Reservation, now: float) -> None:
    if self.state in (TransferState.RESERVED, TransferState.RECEIVING):
        self.state = TransferState.DRAINED


def _write_cached_pages(patch: Patch) -> None:
    reserved = DecodeHandover.reserved

    def reserved_all(self: DecodeHandover, grant: BlocksReserved) -> None:
        reserved(self, replace(grant, num_cached_blocks=0))

    patch.setattr(DecodeHandover, "reserved", reserved_all)


def _drop_last_block(patch: Patch) -> None:
    source_blocks = PageConverter.source_blocks

    def all_but_one(self: PageConverter, first_token: int, num_tokens: int) -> range:
        return source_blocks(self, first_token, num_tokens)[:-1]

    patch.setattr(PageConverter, "source_blocks", all_but_one)


def _wait_without_end(patch: Patch) -> None:
    """The commit's deadline is sooner than the one before, and nobody wakes for it."""

    def commit(self: InboundTransfers, frame: Any, writer: Any, now: float, *, may_wait: bool) -> None:
        tokens = frame.message.commit
        finished = set(tokens.finished_choices)
        writer.transfer.first_tokens = {
            choice: token for choice, token in enumerate(tokens.first_tokens) if choice not in finished
        }
        writer.transfer.reservation.commit(now, may_wait=may_wait)
        self._finish_if_committed(writer.transfer)

    patch.setattr(InboundTransfers, "commit", commit)


def _never_forget_without_calls(self: InboundTransfers, reservation: Reservation) -> None:
    transfer = self._open.get(reservation.transfer_id)
    if transfer is not None:
        self._decide(transfer, TransferRefused("state", "it is not wanted any more"))


def _expire_only_writers(self: Reservation, now: float) -> bool:
    if self.is_over or now < self.deadline:
        return False
    self.abort(now)
    return True


def _settle_at_once(patch: Patch) -> None:
    settle = DecodeHandover._settle

    def settle_and_give_back(
        self: DecodeHandover, reservation: Reservation, outcome: str = "aborted"
    ) -> None:
        if not reservation.is_over:
            reservation.state = TransferState.DRAINED
        settle(self, reservation, outcome)

    patch.setattr(DecodeHandover, "_settle", settle_and_give_back)


# --- sending --------------------------------------------------------------------------------------------


def _release_before_reading(patch: Patch) -> None:
    def next_item(self: OutboundTransfer) -> Any:
        if not self._queue:
            return None
        item = self._queue.popleft()
        if isinstance(item, PagesToSend):
            self._release(item.blocks)
        return item

    patch.setattr(OutboundTransfer, "next", next_item)
    patch.setattr(OutboundTransfer, "done_with", _nothing)


def _release_twice(self: OutboundTransfer, blocks: tuple[int, ...]) -> None:
    self._release(blocks)


def _keep_queue(self: OutboundTransfer) -> None:
    self.is_over = True
    for blocks in self._held:
        self._release(blocks)


def _forget_late_pages(self: OutboundTransfer, pages: PagesToSend) -> None:
    if not self.is_over and pages.blocks:
        self._queue.append(pages)


def _export_unheld(patch: Patch) -> None:
    hold = SequencePages._hold_for_export

    def hold_nothing(self: SequencePages, *arguments: Any) -> Any:
        pages = hold(self, *arguments)
        self.pool.release(pages.blocks)
        return pages

    patch.setattr(SequencePages, "_hold_for_export", hold_nothing)


def _leave_prompt_running(self: PrefillHandover, request_id: str, choice: int | None) -> None:
    if choice is None:
        self._prompts.pop(request_id, None)


def _pages_after_abort_stay_held(self: PrefillHandover, blocks: tuple[int, ...]) -> None:
    pass


def _export_early(patch: Patch) -> None:
    export_layers = SequencePages.export_layers

    def export_one_more(self: SequencePages, sequence: Any, num_tokens: int, end_layer: int) -> Any:
        return export_layers(self, sequence, num_tokens, end_layer + 1)

    patch.setattr(SequencePages, "export_layers", export_one_more)


MUTANTS = (
    Mutant("frames are taken whatever their checksum", _replace(inbound, "check", _nothing)),
    Mutant("commits are taken whatever their checksum", _replace(inbound, "check_seal", _nothing)),
    Mutant("frames are taken in any state", _replace(Reservation, "accept", _accept_in_any_state)),
    Mutant(
        "tickets are taken whatever their epoch", _replace(ReservationTable, "find", _find_whatever_the_epoch)
    ),
    Mutant("frames are taken twice", _replace(_Writer, "take", _take_twice)),
    Mutant("a commit is taken whatever is missing", _replace(Reservation, "commit", _commit_incomplete)),
    Mutant("pages pass before the commit", _replace(Reservation, "settle", _settle_before_commit)),
    Mutant("a commit does not wait for copies", _replace(Reservation, "settle", _commit_beside_copies)),
    Mutant(
        "an abort does not wait for copies",
        _replace(Reservation, "_drain_if_alone", _drain_beside_copies),
    ),
    Mutant("an abort gives pages back at once", _replace(Reservation, "abort", _abort_at_once)),
    Mutant("an abort does not wait for writers", _settle_at_once),
    Mutant("cached pages are written as well", _write_cached_pages),
    Mutant("the last block is not asked for", _drop_last_block),
    Mutant("nobody wakes for a commit's deadline", _wait_without_end),
    Mutant("nobody wakes for deadlines", _replace(DecodeHandover, "deadline_changed", _nothing)),
    Mutant("a writer is never fenced", _replace(Reservation, "expire", _expire_only_writers)),
    Mutant(
        "a transfer without calls is not forgotten",
        _replace(InboundTransfers, "aborted", _never_forget_without_calls),
    ),
    Mutant("prefill releases pages before it reads them", _release_before_reading),
    Mutant("nobody settles what a writer has left", _replace(DecodeHandover, "writer_gone", _nothing)),
    Mutant("prefill releases pages twice", _replace(OutboundTransfer, "done_with", _release_twice)),
    Mutant("prefill keeps pages of a transfer that failed", _replace(OutboundTransfer, "close", _keep_queue)),
    Mutant("prefill exports layers that are not computed", _export_early),
    Mutant("prefill exports pages that it does not hold", _export_unheld),
    Mutant(
        "prefill goes on with an aborted prompt", _replace(PrefillHandover, "abort", _leave_prompt_running)
    ),
    Mutant(
        "prefill keeps pages that come after an abort",
        _replace(PrefillHandover, "_release", _pages_after_abort_stay_held),
    ),
)
