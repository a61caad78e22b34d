"""A step, recorded once as calls of C kernels: Python costs it the same for 2 layers and for 80.

It also lets go of the interpreter once a step and not at every kernel, so that the event loop's thread, which
takes it then, does not hold the step up in between.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.attention.c_kernels import CpuKernelAttention
from baton.engine.inputs import StepArrays
from baton.engine.models.decoder import Decoder
from baton_kernels.cpu.argmax import argmax
from baton_kernels.cpu.calls import ChosenRows, NotRecordable, recorded

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Of the sampled rows `[S, V]`, overwritten by the next step, and their likeliest tokens if asked for."""

    logits: Tensor
    likeliest: list[int] | None


class RecordedStep:
    """Steps of one decoder over one pool. Not for several threads."""

    def __init__(
        self, decoder: Decoder, attention: CpuKernelAttention, max_num_tokens: int, max_num_rows: int
    ) -> None:
        """`max_num_rows`: that are sampled. Raises NotRecordable where something is no C kernel."""
        self._attention = attention
        self._token_ids, self._positions = (np.zeros(max_num_tokens, dtype=np.int64) for _ in range(2))
        self._sampled, self._num_sampled = np.zeros(max_num_rows, dtype=np.int64), np.ones(1, dtype=np.int64)
        chosen = ChosenRows(torch.from_numpy(self._sampled), torch.from_numpy(self._num_sampled))
        no_rows = torch.zeros(1, dtype=torch.int64)
        step = attention.begin_step(AttentionMetadata(no_rows, no_rows[:, None], no_rows, (0, 0), (0,), 0))
        token_ids, positions = torch.from_numpy(self._token_ids), torch.from_numpy(self._positions)
        self._ends = [0]  # calls so far after each layer
        with recorded(attention.library) as self._recording:
            states, self._angles = decoder.embed(token_ids), decoder.angles(positions)
            hidden = decoder.run_layers(
                states, *self._angles, step, lambda _: self._ends.append(len(self._recording))
            )
            self._logits = decoder.chosen_logits(hidden, chosen)
            self._end_of_logits = len(self._recording)
            self._likeliest = argmax(attention.library, self._logits, chosen)

    def takes(self, arrays: StepArrays) -> bool:
        """Whether the step is no larger than what was recorded."""
        return len(arrays.token_ids) <= len(self._token_ids) and len(arrays.sampled_rows) <= len(
            self._sampled
        )

    def run(
        self,
        arrays: StepArrays,
        stops: Collection[int],
        after_layer: Callable[[int], None],
        wants_likeliest: bool,
    ) -> StepLogits:
        """Compute the step; `after_layer` is called with the number of layers that are done, if in `stops`.

        Raises MemoryError.
        """
        num_tokens, num_sampled = len(arrays.token_ids), len(arrays.sampled_rows)
        self._token_ids[:num_tokens] = arrays.token_ids
        self._positions[:num_tokens] = arrays.positions
        self._sampled[:num_sampled] = arrays.sampled_tokens
        self._num_sampled[0] = num_sampled
        self._attention.begin_recorded_step(arrays, self._angles)
        first = 0
        for layer in sorted(stops):
            self._recording.run(first, self._ends[layer], num_tokens)
            first = self._ends[layer]
            after_layer(layer)
        wants_likeliest = wants_likeliest and num_sampled > 0
        end = self._ends[-1] if num_sampled == 0 else self._end_of_logits
        self._recording.run(first, len(self._recording) if wants_likeliest else end, num_tokens)
        likeliest = self._likeliest[:num_sampled].tolist() if wants_likeliest else None
        return StepLogits(self._logits[:num_sampled], likeliest)


def recorded_step(
    decoder: Decoder, attention: AttentionBackend, max_num_tokens: int, max_num_rows: int
) -> RecordedStep | None:
    """None, and said so, where something computes that is no C kernel."""
    if not isinstance(attention, CpuKernelAttention):
        return None
    try:
        with torch.inference_mode():
            return RecordedStep(decoder, attention, max_num_tokens, max_num_rows)
    except NotRecordable as reason:
        _logger.info("steps are computed call by call: %s", reason)
        return None
