"""A ticket: what the prefill server needs to hand pages to the decode server that reserved room for them."""

from dataclasses import dataclass

from baton.core.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class WorkerTransports:
    """What a worker can move pages with."""

    host_id: str = ""  # equal for workers that share a machine; empty: unknown
    device: str = "cpu"  # where the pages lie
    names: tuple[str, ...] = ("grpc",)
    gpu_id: str = ""  # of the GPU that the pages lie on, the same in every process; empty: none

    def is_on_host_of(self, other: "WorkerTransports") -> bool:
        """Whether the two workers are known to share a machine."""
        return bool(self.host_id) and self.host_id == other.host_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The right to fill blocks [first_block, num_blocks) of one request's pages on one decode server."""

    transfer_id: bytes  # 16 random bytes
    epoch: int  # of the decode server
    request_id: str
    address: str  # where to push
    first_block: int  # blocks before it are in the decode server's prefix cache
    num_blocks: int  # blocks of the whole prompt
    layout: KVLayout
    protocol_version: int  # newest that the decode server speaks
    num_tokens: int  # of the prompt
    transports: WorkerTransports = WorkerTransports()

    @property
    def first_token(self) -> int:
        """Of the prompt; those before it don't travel."""
        return self.first_block * self.layout.block_size
