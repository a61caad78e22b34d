"""Products of 8-bit floats on a device without a GPU, which not every torch that Baton runs on has."""

import pytest
import torch

from baton.engine.quantization.float8_linear import Float8Linear
from baton_kernels.quantization import float8_rows


def require_products(device: torch.device) -> None:
    """Skip the test where torch multiplies with a scale for each row on GPUs alone, as 2.11 does."""
    if device.type == "cuda":
        return
    try:
        Float8Linear(*float8_rows(torch.ones(16, 16)), None)(torch.ones(2, 16, dtype=torch.bfloat16))
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} multiplies 8-bit floats by rows on GPUs only")
