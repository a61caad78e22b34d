"""Random cases on a library of any build: `python -m tests.kernels.run_cases LIBRARY COUNT`."""

import sys
from pathlib import Path

import torch

from baton_kernels.cpu.library import load
from tests.kernels.cases import (
    check_allowed_rows,
    check_argmax,
    check_attention,
    check_attention_float8,
    check_gated_int8,
    check_int8_is_exact,
    check_linear,
    check_linear_int8,
)
from tests.kernels.drawn_tokens import check_drawn, check_logprobs


def main(path: str, count: str) -> None:
    """Prints how many it has run."""
    torch.set_num_threads(1)
    library = load(Path(path))
    for seed in range(1000, 1000 + int(count)):
        check_argmax(library, seed)
        check_allowed_rows(library, seed)
        check_drawn(library, seed)
        check_logprobs(library, seed)
        check_linear(library, seed)
        check_linear_int8(library, seed)
        check_int8_is_exact(library, seed)
        check_gated_int8(library, seed)
        check_attention(library, seed)
        check_attention_float8(library, seed)
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
