"""Transport "nccl": pages in messages of a pair of process groups. Torch is imported where one is made."""

import importlib.util
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc

from baton.core.page_ports import PageStore
from baton.core.ticket import WorkerTransports
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.frames import longest_message
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transports import base

if TYPE_CHECKING:
    from baton_kv_transfer.transports.pair.link import PairLink, PairRoute

_CARRIERS = {"cuda": "NCCL", "cpu": "Gloo"}  # by where a pair has its buffers

PairContext = grpc.aio.ServicerContext[transfer_pb2.PairFrame, transfer_pb2.PairReply]


class _PairLinks:
    """A prefill server's pairs, one with each decode server."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._links: dict[str, PairLink] = {}  # by address

    def route(self, request: base.RouteRequest) -> "PairRoute | None":
        """See SendingSide: None while the pair is being made."""
        from baton_kv_transfer.transports.pair.link import PairLink, PairRoute

        ticket, store = request.ticket, self._store
        link = self._links.get(ticket.address)
        if link is None:
            max_bytes, checksum = longest_message(store.layout), _checksum(store)
            link = PairLink(ticket.address, request.metadata, max_bytes, request.stall_timeout_s, checksum)
            self._links[ticket.address] = link
        device = "cpu" if store.device_pages is None else store.device_pages.device
        device = pair_device(device, ticket.transports.device)
        pair = link.pair(ticket.epoch, device)
        return None if pair is None else PairRoute(ticket, store, pair, _CARRIERS[device])

    async def close(self) -> None:
        """End them all."""
        for link in self._links.values():
            await link.close()


class _PairIntake(base.Intake):
    async def prepare(self) -> None:
        """See Intake: pages may come now, beside this call."""
        await self.request.context.send_initial_metadata(())


def pair_device(mine: str, theirs: str) -> str:
    """Where a pair has its buffers: "cuda" between GPUs; "cpu" where the pages of either lie on none."""
    return "cuda" if mine == theirs == "cuda" else "cpu"


def _carrier(mine: WorkerTransports, theirs: WorkerTransports) -> str:
    return _CARRIERS[pair_device(mine.device, theirs.device)]


def _sending(store: PageStore, reader: PageReader) -> base.SendingSide:
    links = _PairLinks(store)
    return base.SendingSide(route=links.route, close=links.close)


def _receiving(store: PageStore, copies: DeviceCopies | None) -> base.ReceivingSide:
    def methods(worker: base.ReceivingWorker) -> base.Methods:
        async def pair(frames: AsyncIterator[transfer_pb2.PairFrame], context: PairContext) -> None:
            from baton_kv_transfer.transports.pair.receiver import PairReceiver

            receiver = PairReceiver(worker, longest_message(store.layout), _checksum(store))
            await receiver.pair(frames, context)

        handler = grpc.stream_stream_rpc_method_handler(
            pair,
            request_deserializer=transfer_pb2.PairFrame.FromString,
            response_serializer=transfer_pb2.PairReply.SerializeToString,
        )
        return {"Pair": handler}

    return base.ReceivingSide(intake=_PairIntake, methods=methods)


def _checksum(store: PageStore) -> Callable[[Any], int] | None:
    """Of bytes on the device where the pages are; None: they are host memory."""
    return None if store.device_pages is None else store.device_pages.checksum


def _lack(store: PageStore) -> str | None:
    return None if importlib.util.find_spec("torch") else base.lacks_package("nccl")


def _obstacle(mine: WorkerTransports, theirs: WorkerTransports) -> str | None:
    is_one_gpu = mine.gpu_id and mine.gpu_id == theirs.gpu_id
    return "NCCL does not connect two processes on one GPU" if is_one_gpu else None


TRANSPORT = base.Transport(
    sending=_sending, receiving=_receiving, lack=_lack, obstacle=_obstacle, carrier=_carrier
)
