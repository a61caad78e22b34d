"""KV pages of one layout written into pages of another, where they arrive."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.core.kv_layout import DTYPE_BYTES, FLOAT8, KVLayout
from baton.core.reservation import FramePlace

# numpy has no bfloat16: values travel as unsigned integers of their size, and bfloat16 is the upper half of
# a float32.
RawArray = NDArray[Any]  # uint8, uint16 or uint32
_FLOAT8_MAX = 448.0
_FLOAT8_NAN = 0x7F


class Pages(Protocol):
    """Pages in host memory, or copies of them there."""

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """See PageStore."""
        ...


class PageConverter:
    """Writes a sender's pages into a receiver's, whatever differs in block size, dtype and heads."""

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        """Raises TransferRefused, naming what can't be converted."""
        source.require_convertible_to(target)
        self.heads = source.shared_heads(target)  # of the model: what this source contributes
        self.is_same = source == target  # pages fit as they are
        self._source = source
        self._target = target
        self._source_heads = _slice_from(self.heads, source.first_kv_head)
        self._target_heads = _slice_from(self.heads, target.first_kv_head)

    def source_blocks(self, first_token: int, num_tokens: int) -> range:
        """The sender's blocks that hold tokens [first_token, num_tokens)."""
        first = first_token // self._source.block_size
        return range(first, self._source.blocks_for(num_tokens) if first_token < num_tokens else first)

    def target_blocks(self, first_token: int, num_tokens: int, place: FramePlace) -> range:
        """The receiver's blocks that hold tokens of a place, which counts the sender's blocks."""
        start, stop = self._tokens(first_token, num_tokens, place)
        first = start // self._target.block_size
        return range(first, self._target.blocks_for(stop) if start < stop else first)

    def _tokens(self, first_token: int, num_tokens: int, place: FramePlace) -> tuple[int, int]:
        """First token of a place that is to be written, and the end."""
        block_size = self._source.block_size
        stop = (place.first_block + place.num_blocks) * block_size
        return max(first_token, place.first_block * block_size), min(num_tokens, stop)

    def write(
        self,
        store: Pages,
        block_table: Sequence[int],
        first_token: int,
        num_tokens: int,
        place: FramePlace,
        payload: memoryview,
    ) -> None:
        """Write tokens [first_token, num_tokens) of a checked payload; its place counts the sender's blocks.

        `payload` holds `[num_blocks, num_layers, 2, heads, block_size, head_dim]` as the sender has them.
        `block_table` holds the receiver's pages of the whole prompt; those before the first token's are
        shared, and are not written. Of pages that are only copied, the last one is copied whole.
        """
        if self.is_same and first_token % self._target.block_size == 0:
            blocks = self.source_blocks(first_token, num_tokens)
            self._copy(store, block_table, blocks, place, payload)
            return
        block_size = self._source.block_size
        start, stop = self._tokens(first_token, num_tokens, place)
        if start >= stop:
            return
        values = self._values(place, payload)
        for index, page_start, page_stop in _by_block(start, stop, self._target.block_size):
            page = self._page(store, block_table[index], place)
            first = index * self._target.block_size
            for block, begin, end in _by_block(page_start, page_stop, block_size):
                offset = block * block_size
                page[:, :, :, begin - first : end - first] = values[
                    block - place.first_block, :, :, :, begin - offset : end - offset
                ]

    def _copy(
        self,
        store: Pages,
        block_table: Sequence[int],
        blocks: range,
        place: FramePlace,
        payload: memoryview,
    ) -> None:
        """The place's pages as they are, as far as they are among `blocks`."""
        size = place.num_layers * self._source.bytes_per_layer
        for index in range(place.num_blocks):
            block = place.first_block + index
            if block in blocks:
                page = store.page(block_table[block], place.first_layer, place.num_layers)
                source = payload[index * size : (index + 1) * size]
                # Not page[:] = source, which keeps the interpreter to itself while it copies.
                np.copyto(np.frombuffer(page, np.uint8), np.frombuffer(source, np.uint8))

    def _values(self, place: FramePlace, payload: memoryview) -> RawArray:
        """Shared heads in the target's dtype: `[num_blocks, num_layers, 2, heads, block_size, head_dim]`."""
        shape = (place.num_blocks, *_page_shape(self._source, place.num_layers))
        raw = np.frombuffer(payload, _raw_type(self._source.dtype)).reshape(shape)
        raw = raw[:, :, :, self._source_heads]
        source, target = self._source, self._target
        if source.dtype == target.dtype and source.scales == target.scales:
            return raw
        if not source.scales and not target.scales:
            return convert_dtype(raw, source.dtype, target.dtype)
        values = np.empty(raw.shape, _raw_type(target.dtype))
        for layer, part in itertools.product(range(place.num_layers), range(2)):
            index = 2 * (place.first_layer + layer) + part
            scales = tuple(layout.scales[index] if layout.scales else 1.0 for layout in (source, target))
            values[:, layer, part] = convert_dtype(
                raw[:, layer, part], source.dtype, target.dtype, scales[0], scales[1]
            )
        return values

    def _page(self, store: Pages, block_id: int, place: FramePlace) -> RawArray:
        """The shared heads of the place's layers of one page: the store's memory."""
        page = store.page(block_id, place.first_layer, place.num_layers)
        raw = np.frombuffer(page, _raw_type(self._target.dtype))
        return raw.reshape(_page_shape(self._target, place.num_layers))[:, :, self._target_heads]


def convert_dtype(
    raw: RawArray, source: str, target: str, source_scale: float = 1.0, target_scale: float = 1.0
) -> RawArray:
    """Floats as raw integers, rounded to nearest even; what is too large becomes infinite, NaN stays NaN.

    A number is what is stored times its side's scale, which only FLOAT8 has. FLOAT8 has no infinity: what is
    too large becomes the greatest that it has.
    """
    if source == target and source_scale == target_scale:
        return raw
    if DTYPE_BYTES[source] == 4 or (target == "float32" and source != FLOAT8):
        values = _to_float32(raw, source)
        if source_scale != target_scale:
            with np.errstate(all="ignore"):
                values = values * np.float32(source_scale / target_scale)
        return _from_float32(values, target)
    return _table(source, target, source_scale, target_scale).take(raw)


@lru_cache(maxsize=256)  # of 64 KiB and more each: those of a model's layers
def _table(source: str, target: str, source_scale: float, target_scale: float) -> RawArray:
    """What becomes of each value of 8 or 16 bits; three times as fast as to convert them through float32."""
    bits = 8 * DTYPE_BYTES[source]
    values = _to_float32(np.arange(1 << bits, dtype=f"u{DTYPE_BYTES[source]}"), source)
    with np.errstate(all="ignore"):
        values = values * np.float32(source_scale) / np.float32(target_scale)
    return _from_float32(values, target)


def _to_float32(raw: RawArray, dtype: str) -> NDArray[np.float32]:
    """Exact, whichever the dtype."""
    if dtype == "float32":
        return raw.view(np.float32)
    if dtype == "float16":
        with np.errstate(all="ignore"):
            return raw.view(np.float16).astype(np.float32)
    if dtype == FLOAT8:
        return _float8_values().take(raw)
    bits = raw.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


@cache
def _float8_values() -> NDArray[np.float32]:
    """The 256 numbers that 8 bits can be."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    sizes = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10))
    sizes[codes & 0x7F == _FLOAT8_NAN] = np.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


def _from_float32(values: NDArray[np.float32], dtype: str) -> RawArray:
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        with np.errstate(all="ignore"):  # overflow would warn
            return values.astype(np.float16).view(np.uint16)
    if dtype == FLOAT8:
        return _to_float8(values)
    return _to_bfloat16(values)


def _to_bfloat16(values: NDArray[np.float32]) -> RawArray:
    bits = values.view(np.uint32)
    # Half of the last place that stays, less one where that place is even: a carry is a round up.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():  # a carry may have made it infinite or zero
        result[is_nan] = bits[is_nan] >> 16 | 0x0040
    return result


def _to_float8(values: NDArray[np.float32]) -> RawArray:
    sizes = np.minimum(np.abs(values), np.float32(_FLOAT8_MAX))  # NaN stays
    # Adding 2^14 rounds to a multiple of 2^-9, the distance of the small ones, which is then the lowest bits.
    with np.errstate(all="ignore"):  # NaN would warn
        small = (sizes + np.float32(2.0**14)).view(np.uint32) - 0x46800000
    bits = sizes.view(np.uint32)
    large = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)  # exponents count from 7, not from 127
    codes = np.where(sizes < np.float32(2.0**-6), small, large).astype(np.uint8)
    codes[np.isnan(values)] = _FLOAT8_NAN
    return codes | np.where(np.signbit(values), np.uint8(0x80), np.uint8(0))


def _by_block(start: int, stop: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """Tokens [start, stop) cut where blocks end: block index, first token, end."""
    while start < stop:
        block = start // block_size
        end = min(stop, (block + 1) * block_size)
        yield block, start, end
        start = end


def _page_shape(layout: KVLayout, num_layers: int) -> tuple[int, ...]:
    return (num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)


def _raw_type(dtype: str) -> np.dtype[Any]:
    return np.dtype(f"u{DTYPE_BYTES[dtype]}")


def _slice_from(heads: range, first: int) -> slice:
    return slice(heads.start - first, heads.stop - first)
