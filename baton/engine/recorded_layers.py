"""A decoder's layers, recorded once as calls of C kernels: Python costs a step the same for 2 layers and for 80."""

import logging
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.attention.cpu_kernels import CpuKernelAttention
from baton.engine.models.decoder import Decoder
from kernels.cpu.calls import NotRecordable, recorded

_logger = logging.getLogger(__name__)


class RecordedLayers:
    """Steps of up to `max_num_tokens`, of one decoder over one pool. Not for several threads."""

    def __init__(
        self, decoder: Decoder, attention: CpuKernelAttention, max_num_tokens: int
    ) -> None:
        """Raises NotRecordable where a layer computes anything that is no C kernel."""
        self._attention = attention
        config, dtype = decoder.config, decoder.dtype
        self._states = torch.empty(max_num_tokens, config.hidden_size, dtype=dtype)
        angles = torch.empty(max_num_tokens, 1, config.head_dim, dtype=dtype)
        no_rows = torch.zeros(1, dtype=torch.int64)
        metadata = AttentionMetadata(no_rows, no_rows[:, None], no_rows, (0, 0), (0,), 0)
        step = attention.begin_step(metadata)
        self._bounds = [0]  # calls before each layer
        with recorded(attention.library) as self._recording:

            def after_layer(_: int) -> None:
                self._bounds.append(len(self._recording))

            self._output = decoder.run_layers(self._states, angles, angles, step, after_layer)

    def run(
        self,
        states: Tensor,
        angles: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
        stops: Collection[int],
        after_layer: Callable[[int], None],
    ) -> Tensor:
        """As `Decoder.run_layers`; `after_layer` is called after the layers in `stops` alone.

        The result is overwritten by the next step.
        """
        num_tokens, num_layers = states.shape[0], len(self._bounds) - 1
        self._states[:num_tokens] = states
        self._attention.begin_step(metadata)
        self._attention.use_angles(*angles)
        first = 0
        for layer in sorted({*stops, num_layers}):
            self._recording.run(self._bounds[first], self._bounds[layer], num_tokens)
            first = layer
            if layer in stops:
                after_layer(layer)
        return self._output[:num_tokens]


def recorded_layers(
    decoder: Decoder, attention: AttentionBackend, max_num_tokens: int
) -> RecordedLayers | None:
    """None, and said so, where something computes that is no C kernel."""
    if not isinstance(attention, CpuKernelAttention):
        return None
    try:
        with torch.inference_mode():
            return RecordedLayers(decoder, attention, max_num_tokens)
    except NotRecordable as reason:
        _logger.info("layers are computed call by call: %s", reason)
        return None
