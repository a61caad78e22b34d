"""Attention over the paged pool in C (attention.c); shapes as in `baton_kernels.reference`."""

import ctypes
from typing import Any

import numpy as np
from torch import Tensor

from baton_kernels.cpu.calls import Kernel, make_call, new_tensor
from baton_kernels.cpu.library import DTYPES, PAGE_DTYPES
from baton_kernels.quantization import layer_scales
from baton_kernels.rotation import Rotation

Integers = np.ndarray[Any, np.dtype[np.int64]]


class _Step(ctypes.Structure):
    """struct attention_step"""

    _fields_ = [
        ("num_tokens", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_one_token_rows", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("slot_mapping", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("row_bounds", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
    ]


class _Attention(ctypes.Structure):
    """struct attention"""

    _fields_ = [
        ("step", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("pool_dtype", ctypes.c_int32),
        ("layer", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("states_stride", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
        ("key_scale", ctypes.c_float),
        ("value_scale", ctypes.c_float),
        ("output", ctypes.c_void_p),
    ]


class PagedAttention:
    """Stores K and V of a step's tokens in their slots and attends, layer by layer. Not for several threads.

    Rows of one token come first. A slot that is not of a row's own context is never read.
    """

    def __init__(self, library: ctypes.CDLL, pool: Tensor, scales: tuple[float, ...] = ()) -> None:
        """`pool` and, of a float8 pool, `scales` as in `baton_kernels.reference`; on the CPU."""
        _, num_layers, _, num_kv_heads, block_size, head_dim = pool.shape
        self._library = library
        self._scales = scales
        self._pool = pool  # keeps the memory that the arguments point to, as `_arrays` do
        self._arrays: tuple[Integers, ...] = ()
        self._angles: tuple[Tensor | None, Tensor | None] = (None, None)
        self._step = _Step()
        self._arguments = _Attention(
            step=ctypes.addressof(self._step),
            pool=pool.data_ptr(),
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_dim=head_dim,
            pool_dtype=PAGE_DTYPES[pool.dtype],
        )

    def begin_step(
        self,
        slot_mapping: Integers,
        block_tables: Integers,
        context_lens: Integers,
        row_bounds: Integers,
        num_one_token_rows: int,
    ) -> None:
        """int64 `[T]`, `[R, B]`, `[R]` and `[R + 1]`, as in `baton.engine.attention.base`."""
        arrays = (slot_mapping, block_tables, context_lens, row_bounds)
        self._arrays = tuple(np.ascontiguousarray(array) for array in arrays)
        step = self._step
        step.num_tokens, step.num_rows = slot_mapping.shape[0], context_lens.shape[0]
        step.num_one_token_rows, step.table_width = num_one_token_rows, block_tables.shape[1]
        step.slot_mapping, step.block_tables, step.context_lens, step.row_bounds = (
            array.ctypes.data for array in self._arrays
        )

    def use_angles(self, cosines: Tensor | None, sines: Tensor | None) -> None:
        """Of the step's tokens, as in `Rotation`; None: queries and keys are rotated already."""
        self._angles = (cosines, sines)
        self._step.cosines = None if cosines is None else cosines.data_ptr()
        self._step.sines = None if sines is None else sines.data_ptr()

    def attend(self, layer: int, states: Tensor, window: int | None, rotation: Rotation | None) -> Tensor:
        """Attention of one layer: `[T, H, D]` in the dtype of `states`.

        states: `[T, H + 2 * K, D]`, each token's queries, keys and values, contiguous; with a `rotation` they
        are not rotated yet, and the queries are overwritten. window: last tokens a query sees; None: all.
        Raises MemoryError.
        """
        arguments = self._arguments
        num_tokens, num_states, head_dim = states.shape
        num_heads = num_states - 2 * arguments.num_kv_heads
        output = new_tensor(num_tokens, num_heads, head_dim, dtype=states.dtype)
        head_bytes = head_dim * states.itemsize
        query = states.data_ptr()
        arguments.layer, arguments.window = layer, window or 0
        arguments.dtype = DTYPES[states.dtype]
        arguments.key_scale, arguments.value_scale = layer_scales(self._scales, layer)
        arguments.num_heads, arguments.states_stride = num_heads, num_states * head_dim
        arguments.query = query
        arguments.key = query + num_heads * head_bytes
        arguments.value = query + (num_heads + arguments.num_kv_heads) * head_bytes
        arguments.output = output.data_ptr()
        self._rotate(rotation)
        make_call(self._library, Kernel.ATTENTION, arguments, num_tokens)
        return output

    def _rotate(self, rotation: Rotation | None) -> None:
        arguments = self._arguments
        if rotation is None:
            self.use_angles(None, None)
            return
        self.use_angles(rotation.cosines, rotation.sines)
        arguments.query_norm, arguments.key_norm = None, None
        if rotation.norms is not None:
            query_norm, key_norm, eps = rotation.norms
            arguments.query_norm, arguments.key_norm = query_norm.data_ptr(), key_norm.data_ptr()
            arguments.norm_eps = eps
