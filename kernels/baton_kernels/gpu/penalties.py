"""What tokens seen so far do to logits."""

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


def penalise(
    logits: Tensor,
    prompt_counts: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Repetition (Keskar et al., 2019) over prompt and output; frequency and presence over the output.

    logits: float32 `[n, V]`, contiguous, changed in place. prompt_counts, output_counts: int32 `[n, V]`, how
    often each token is in a row's prompt and output. The penalties: float32 `[n]`; 1, 0 and 0 change nothing.
    """
    num_rows, vocab_size = logits.shape
    _penalise[(num_rows, triton.cdiv(vocab_size, _TILE))](
        logits, prompt_counts, output_counts, repetition, frequency, presence, vocab_size,
        TILE=_TILE, num_warps=4,
    )  # fmt: skip


# Columns of one copy from the host, wherever they lie in it.
@triton.jit(do_not_specialize_on_alignment=["repetitions", "frequencies", "presences"])
def _penalise(
    logits, prompt_counts, output_counts, repetitions, frequencies, presences, size,
    TILE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_there = columns < size
    places = row.to(tl.int64) * size + columns
    values = tl.load(logits + places, mask=is_there, other=0.0)
    output_count = tl.load(output_counts + places, mask=is_there, other=0)
    is_seen = (tl.load(prompt_counts + places, mask=is_there, other=0) + output_count) > 0
    repetition = tl.load(repetitions + row)
    repeated = tl.where(values > 0.0, tl.div_rn(values, repetition), values * repetition)
    values = tl.where(is_seen, repeated, values)
    in_output = tl.where(output_count > 0, tl.load(presences + row), 0.0)
    values -= tl.load(frequencies + row) * output_count.to(tl.float32) + in_output
    tl.store(logits + places, values, mask=is_there)
