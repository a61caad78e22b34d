"""What this machine computes with, for `baton doctor`, which itself knows no torch:

python -m baton.engine.this_machine     prints it as JSON
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass

import torch

from baton.engine.devices import resolve_device
from baton_kernels.cpu.build import cpu_features, supported_levels
from baton_kernels.cpu.library import cpu_kernels


@dataclass(frozen=True, slots=True)
class Machine:
    """Device and kernels."""

    torch: str
    device: str  # "cpu", or a GPU's name
    why_no_gpu: str | None  # None: there is one
    best_level: str  # of the C kernels that this CPU could run
    has_kernels: bool  # whether they are built, or could be
    why_no_kernels: str | None
    multiplies_bfloat16: bool


def this_machine() -> Machine:
    """Builds the C kernels if need be, as a worker's start would."""
    said = _Said()
    logging.getLogger("baton").addHandler(said)
    logging.getLogger("baton_kernels").addHandler(said)
    logging.getLogger().setLevel(logging.INFO)
    device = resolve_device("auto")
    is_gpu = device.type == "cuda"
    obstacle = None if is_gpu else said.last.removeprefix("device: cpu (").removesuffix(")")
    kernels = cpu_kernels()
    return Machine(
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        why_no_gpu=obstacle,
        best_level=supported_levels()[0].name,
        has_kernels=kernels is not None,
        why_no_kernels=said.last if kernels is None else None,
        multiplies_bfloat16="avx512_bf16" in cpu_features(),
    )


class _Said(logging.Handler):
    """Keeps the last line of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


if __name__ == "__main__":
    json.dump(asdict(this_machine()), sys.stdout)
