"""KV pages from one process's pool to another's, by each transport, without an engine: checksums included.

    python -m bench.page_to_page --transport grpc [--device cuda]

Prefill's sender and decode's receiver as the servers use them, on pools of scattered pages. Run by
bench.handover, which prints all transports beside each other, and on a GPU by bench.gpu_check. With --check
every transfer's pages are compared with what was sent, which takes time that the figures then have in them.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from baton.core.kv_layout import KVLayout
from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace, Reservation, ReservationTable, TransferDeadlines
from baton.core.ticket import Ticket, WorkerTransports
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec, lifecycle
from baton.rpc.allocator import keep_message_buffers
from baton.rpc.server import RpcServer
from baton_kv_transfer.receiver import TransferReceiver
from baton_kv_transfer.sender import TransferSender
from baton_kv_transfer.transfers.inbound import InboundTransfers
from baton_kv_transfer.transfers.pace import InboundPace
from baton_kv_transfer.transports.base import ReceivingWorker
from baton_kv_transfer.transports.registry import ReceivingTransports, SendingTransports
from bench.workers import wait_for_channel

NUM_BLOCKS = 256  # of one request
EPOCH = 7
SOURCE_SEED = 1000  # the sender's pages are others than the receiver's
NUM_WARM_UP = 3
LAYERS, HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 64, 16  # 512 KiB a block in bfloat16


class NumpyPages:
    """A pool of pages in plain memory (baton.core.page_ports.PageStore)."""

    device_pages = None

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        rows = np.arange(num_blocks, dtype=np.uint8)[:, None]
        self._array = np.repeat(rows, layout.bytes_per_block, axis=1)
        self.memory = self._array.reshape(-1).data

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        start = block_id * self.layout.bytes_per_block + first_layer * self.layout.bytes_per_layer
        return self.memory[start : start + num_layers * self.layout.bytes_per_layer]


def pool_of_pages(device: str) -> PageStore:
    """Twice a request's pages, whose every byte is the page's number modulo 256."""
    if device == "cpu":
        return NumpyPages(layout(), 2 * NUM_BLOCKS)
    import torch

    from baton.engine.pages.kv_cache import KVCache

    cache = KVCache(layout(), 2 * NUM_BLOCKS, torch.device(device, 0))
    numbers = torch.arange(2 * NUM_BLOCKS + 1, device=cache.pool.device).to(torch.uint8)
    cache.pool.view(torch.uint8).copy_(numbers.view(-1, 1, 1, 1, 1, 1))
    torch.cuda.synchronize()
    return cache


class Owner:
    """Takes what comes (baton_kv_transfer.transfers.inbound.TransferOwner)."""

    def __init__(self, store: PageStore, checks: bool) -> None:
        self._store = store
        self._checks = checks

    def deadline_changed(self, reservation: Reservation) -> None:
        """Nothing to do."""

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """Raises ValueError where a page is to be checked and has another byte than was sent."""
        if not self._checks:
            return
        theirs, ours = scattered(int(request_id) + SOURCE_SEED), scattered(int(request_id))
        for sent, block in zip(theirs, ours, strict=True):
            page = bytearray(self._store.layout.bytes_per_block)
            if self._store.device_pages is None:
                page[:] = self._store.page(block, 0, LAYERS)
            else:
                self._store.device_pages.read([block], 0, LAYERS, memoryview(page))
            if page.count(sent % 256) != len(page):
                raise ValueError(f"page {block} is not what was sent as {sent}")

    def withdrawn(self, reservation: Reservation) -> None:
        """Nothing to do."""

    def writer_gone(self, reservation: Reservation) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Figures:
    """What one transport did, over all transfers."""

    seconds: list[float]
    num_bytes: int  # of one transfer
    operations: float  # of one transfer
    cpu_seconds: float  # of both processes, all transfers


def layout() -> KVLayout:
    """Pages as a model of medium size has them."""
    return KVLayout(BLOCK_SIZE, LAYERS, HEADS, HEAD_DIM, "bfloat16")


def scattered(seed: int) -> tuple[int, ...]:
    """A request's pages, anywhere in a pool twice as large."""
    return tuple(random.Random(seed).sample(range(2 * NUM_BLOCKS), NUM_BLOCKS))


def transfer_id(index: int) -> bytes:
    """Known to both processes."""
    return index.to_bytes(16, "big")


async def serve(address: str, num_transfers: int, device: str, checks: bool) -> None:
    """The receiving process: a reservation for each transfer that will come."""
    store, stats, table = pool_of_pages(device), TransferStats(), ReservationTable(EPOCH)
    for index in range(num_transfers):
        table.add(
            Reservation(
                transfer_id(index),
                str(index),
                block_table=scattered(index),
                first_block=0,
                num_tokens=NUM_BLOCKS * BLOCK_SIZE,
                heads=store.layout.heads,
                deadlines=TransferDeadlines(),
                now=time.monotonic(),
            )
        )
    transports = ReceivingTransports(store)
    inbound = InboundTransfers(table, store, Owner(store, checks), stats, transports.writer)
    server = RpcServer()
    pace = InboundPace(lambda: False, 1)
    worker = ReceivingWorker(inbound, time.monotonic, stats, pace, host="127.0.0.1", stall_timeout_s=30.0)
    TransferReceiver(worker, transports).add_to(server.grpc)
    await server.start(address, ("baton.v1.Transfer",), "--listen")
    await server.grpc.wait_for_termination()


async def measure(
    transport: str, address: str, receiver_pid: int, num_transfers: int, device: str
) -> Figures:
    """The sending process."""
    store, stats = pool_of_pages(device), TransferStats()
    transports = SendingTransports(store, transport)
    sender = TransferSender(
        store,
        "",
        stats,
        transports,
        asked_transport=transport,
        stall_timeout_s=30.0,
    )
    seconds, cpu_seconds = [], 0.0
    for index in range(num_transfers):
        cpu_before = _cpu_seconds(receiver_pid)
        transfer = sender.begin(_ticket(index, address, transports.offer), lambda blocks: None)
        started = time.monotonic()
        transfer.send_pages(FramePlace(0, NUM_BLOCKS, 0, LAYERS), scattered(index + SOURCE_SEED))
        transfer.commit([1], [])
        await transfer.run()
        if index >= NUM_WARM_UP:
            seconds.append(time.monotonic() - started)
            cpu_seconds += _cpu_seconds(receiver_pid) - cpu_before
    await sender.close()
    operations = stats.transports[transport].num_operations / stats.transports[transport].num_transfers
    return Figures(seconds, NUM_BLOCKS * layout().bytes_per_block, operations, cpu_seconds)


def _ticket(index: int, address: str, mine: WorkerTransports) -> Ticket:
    return Ticket(
        transfer_id=transfer_id(index),
        epoch=EPOCH,
        request_id=str(index),
        address=address,
        first_block=0,
        num_blocks=NUM_BLOCKS,
        layout=layout(),
        protocol_version=codec.PROTOCOL_VERSION,
        num_tokens=NUM_BLOCKS * BLOCK_SIZE,
        transports=replace(mine, names=("grpc", "nccl", "nixl", "cuda_ipc")),
    )


def _cpu_seconds(pid: int) -> float:
    """CPU time of this process and another one (Linux)."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return mine.ru_utime + mine.ru_stime + ticks / 100


def row(transport: str, num_transfers: int, device: str = "cpu", checks: bool = False) -> dict[str, Any]:
    """One line of the table."""
    keep_message_buffers()  # as workers do
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        address = f"unix:{directory}/decode.sock"
        total = num_transfers + NUM_WARM_UP
        command = [sys.executable, "-m", "bench.page_to_page", "--serve", address, "--transfers", str(total)]
        command += ["--device", device, *(["--check"] if checks else [])]
        process = subprocess.Popen(command)
        try:
            wait_for_channel(process, address)
            figures = lifecycle.run(measure(transport, address, process.pid, total, device))
        finally:
            process.kill()
            process.wait()
    ordered = sorted(figures.seconds)
    gigabytes = figures.num_bytes / 1e9
    return {
        "transport": transport,
        "MB": round(figures.num_bytes / 1e6),
        "GB/s p50": round(gigabytes / ordered[len(ordered) // 2], 2),
        "GB/s best": round(gigabytes / ordered[0], 2),
        "operations": round(figures.operations),
        "CPU s/GB": round(figures.cpu_seconds / (gigabytes * len(ordered)), 2),
    }


def row_of_new_processes(transport: str, num_transfers: int) -> dict[str, Any]:
    """The same where this process has sent before: what that left in its memory would slow it down."""
    command = [sys.executable, "-m", "bench.page_to_page", "--transport", transport]
    command += ["--transfers", str(num_transfers), "--json"]
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return figures


def memcpy_gigabytes_per_second() -> float:
    """Speed of one core's copy between two blocks of memory that no cache holds."""
    source, target = np.ones(1 << 28, np.uint8), np.zeros(1 << 28, np.uint8)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return round(source.nbytes / sorted(times)[4] / 1e9, 2)


def main() -> None:
    """Run it, or be its receiving process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", default="grpc")
    parser.add_argument("--transfers", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--check", action="store_true", help="compare every page with what was sent")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        keep_message_buffers()
        lifecycle.run(serve(arguments.serve, arguments.transfers, arguments.device, arguments.check))
    else:
        figures = row(arguments.transport, arguments.transfers, arguments.device, arguments.check)
        if arguments.json:
            print(json.dumps(figures))
        else:
            print(figures, "memcpy GB/s", memcpy_gigabytes_per_second())


if __name__ == "__main__":
    main()
