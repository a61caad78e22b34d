"""A ticket: what the prefill server needs to hand pages to the decode server that reserved room for them."""

from dataclasses import dataclass

from baton.core.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to fill blocks [first_block, num_blocks) of one request's pages on one decode server."""

    transfer_id: bytes  # 16 random bytes
    epoch: int  # of the decode server
    request_id: str
    address: str  # where to push
    first_block: int  # blocks before it are in the decode server's prefix cache
    num_blocks: int  # blocks of the whole prompt
    layout: KVLayout
