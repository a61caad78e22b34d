"""The shape of a KV page, as both ends of a transfer must agree on it."""

from dataclasses import dataclass

from baton.core.errors import TransferRefused

LAYOUT_VERSION = 1
_MUST_BE_EQUAL = ("version", "num_layers", "head_dim", "total_kv_heads")
MODEL_DTYPES = ("float32", "bfloat16", "float16")  # that an engine computes in
FLOAT8 = "float8_e4m3fn"  # 4 bits of exponent, 3 of mantissa, no infinities (Micikevicius et al., 2022)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FLOAT8: 1}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of one pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`.

    A page (block) is contiguous across layers, so that one page is one copy and a group of layers of a
    page is one slice of it. Index 0 of the third axis is K, 1 is V.
    """

    block_size: int  # tokens a page
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of DTYPE_BYTES
    version: int = LAYOUT_VERSION
    # With tensor parallelism a worker has `num_kv_heads` of the model's heads, from `first_kv_head` on.
    first_kv_head: int = 0
    total_kv_heads: int = 0  # of the model; 0 becomes num_kv_heads
    # Of FLOAT8 pages: a number is what is stored times this. K's and V's of each layer in turn, as float32
    # holds them; empty: all 1.
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scales and set(self.scales) == {1.0}:
            object.__setattr__(self, "scales", ())
        if self.total_kv_heads == 0:
            object.__setattr__(self, "total_kv_heads", self.num_kv_heads)

    @property
    def bytes_per_layer(self) -> int:
        """Bytes of one layer of one page."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one page, all layers."""
        return self.num_layers * self.bytes_per_layer

    def blocks_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def heads(self) -> range:
        """The model's KV heads that a page holds."""
        return range(self.first_kv_head, self.first_kv_head + self.num_kv_heads)

    def shared_heads(self, other: "KVLayout") -> range:
        """The model's KV heads that pages of both layouts hold."""
        return range(max(self.heads.start, other.heads.start), min(self.heads.stop, other.heads.stop))

    def require_convertible_to(self, target: "KVLayout") -> None:
        """Raise TransferRefused, saying what is in the way, unless pages of `target` can be made of these:
        block size, dtype and tensor parallelism may differ, nothing else."""
        obstacles = [name for name in _MUST_BE_EQUAL if getattr(self, name) != getattr(target, name)]
        if self.dtype not in DTYPE_BYTES or target.dtype not in DTYPE_BYTES:
            obstacles.append("dtype")
        if not (self._has_sound_scales() and target._has_sound_scales()):
            obstacles.append("scales")
        if self.block_size < 1 or target.block_size < 1:
            obstacles.append("block_size")
        if not self.shared_heads(target):
            obstacles.append("heads (none is on both sides)")
        if any(layout.heads.stop > layout.total_kv_heads for layout in (self, target)):
            obstacles.append("heads (some are not the model's)")
        if obstacles:
            raise TransferRefused(
                "layout",
                f"KV pages can't be converted, for their {', '.join(obstacles)}: "
                f"the receiver has {target}, the sender {self}.",
            )

    def _has_sound_scales(self) -> bool:
        if not self.scales:
            return True
        of_all_layers = self.dtype == FLOAT8 and len(self.scales) == 2 * self.num_layers
        return of_all_layers and all(0.0 < scale < float("inf") for scale in self.scales)

    def can_fill(self, target: "KVLayout") -> bool:
        """Whether a worker with these pages can bring all that a page of `target` holds."""
        try:
            self.require_convertible_to(target)
        except TransferRefused:
            return False
        return self.shared_heads(target) == target.heads
