"""KV pages from one process's pool to another's, by each transport, without an engine: checksums included.

    python -m bench.page_to_page --transport grpc

Prefill's sender and decode's receiver as the servers use them, on pools of scattered pages. Run by
bench.handover, which prints all transports beside each other.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop

from baton.core.kv_layout import KVLayout
from baton.core.reservation import FramePlace, Reservation, ReservationTable, TransferDeadlines
from baton.core.transfer_stats import TransferStats
from baton.rpc import codec
from baton.rpc.allocator import keep_message_buffers
from baton.rpc.server import RpcServer
from baton.rpc.ticket import Ticket, WorkerTransports
from bench.workers import wait_for_channel
from kv_transfer.inbound import InboundTransfers
from kv_transfer.pace import InboundPace
from kv_transfer.receiver import TransferReceiver
from kv_transfer.sender import TransferSender
from kv_transfer.transports.registry import ReceivingTransports, SendingTransports

NUM_BLOCKS = 256  # of one request
EPOCH = 7
NUM_WARM_UP = 3
LAYERS, HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 64, 16  # 512 KiB a block in bfloat16


class NumpyPages:
    """A pool of pages in plain memory (baton.core.ports.PageStore)."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        rows = np.arange(num_blocks, dtype=np.uint8)[:, None]
        self._array = np.repeat(rows, layout.bytes_per_block, axis=1)
        self.memory = memoryview(self._array.reshape(-1))

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        start = block_id * self.layout.bytes_per_block + first_layer * self.layout.bytes_per_layer
        return self.memory[start : start + num_layers * self.layout.bytes_per_layer]


class Owner:
    """Takes what comes (kv_transfer.inbound.TransferOwner)."""

    def deadline_changed(self, reservation: Reservation) -> None:
        """Nothing to do."""

    def committed(self, request_id: str, first_tokens: dict[int, int]) -> None:
        """Nothing to do."""

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


async def serve(address: str, num_transfers: int) -> None:
    """The receiving process: a reservation for each transfer that will come."""
    store, stats, table = NumpyPages(layout(), 2 * NUM_BLOCKS), TransferStats(), ReservationTable(EPOCH)
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
    inbound = InboundTransfers(table, store, Owner(), stats)
    server = RpcServer()
    receiver = TransferReceiver(
        inbound,
        time.monotonic,
        stats,
        ReceivingTransports(),
        InboundPace(lambda: False, 1),
        host="127.0.0.1",
        stall_timeout_s=30.0,
    )
    receiver.add_to(server.grpc)
    await server.start(address, ("baton.v1.Transfer",), "--listen")
    await server.grpc.wait_for_termination()


async def measure(transport: str, address: str, receiver_pid: int, num_transfers: int) -> Figures:
    """The sending process."""
    store, stats = NumpyPages(layout(), 2 * NUM_BLOCKS), TransferStats()
    sender = TransferSender(
        store,
        "",
        stats,
        SendingTransports(store, transport),
        asked_transport=transport,
        stall_timeout_s=30.0,
    )
    seconds, cpu_seconds = [], 0.0
    for index in range(num_transfers):
        cpu_before = _cpu_seconds(receiver_pid)
        transfer = sender.begin(_ticket(index, address), lambda blocks: None)
        started = time.monotonic()
        transfer.send_pages(FramePlace(0, NUM_BLOCKS, 0, LAYERS), scattered(index + 1000))
        transfer.commit([1], [])
        await transfer.run()
        if index >= NUM_WARM_UP:
            seconds.append(time.monotonic() - started)
            cpu_seconds += _cpu_seconds(receiver_pid) - cpu_before
    await sender.close()
    operations = stats.transports[transport].num_operations / stats.transports[transport].num_transfers
    return Figures(seconds, NUM_BLOCKS * layout().bytes_per_block, operations, cpu_seconds)


def _ticket(index: int, address: str) -> Ticket:
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
        transports=WorkerTransports("", "cpu", ("grpc", "nccl", "nixl")),
    )


def _cpu_seconds(pid: int) -> float:
    """CPU time of this process and another one (Linux)."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return mine.ru_utime + mine.ru_stime + ticks / 100


def row(transport: str, num_transfers: int) -> dict[str, Any]:
    """One line of the table."""
    keep_message_buffers()  # as workers do
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        address = f"unix:{directory}/decode.sock"
        total = num_transfers + NUM_WARM_UP
        command = [sys.executable, "-m", "bench.page_to_page", "--serve", address, "--transfers", str(total)]
        process = subprocess.Popen(command)
        try:
            wait_for_channel(process, address)
            figures = uvloop.run(measure(transport, address, process.pid, total))
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
    parser.add_argument("--serve", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        keep_message_buffers()
        uvloop.run(serve(arguments.serve, arguments.transfers))
    else:
        print(row(arguments.transport, arguments.transfers), "memcpy GB/s", memcpy_gigabytes_per_second())


if __name__ == "__main__":
    main()
