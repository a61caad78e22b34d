"""Which device the engine computes on, and whether it can."""

import logging
import warnings

import torch

from baton.core.errors import StartupError

_BFLOAT16_CAPABILITY = (8, 0)  # Ampere
_FLOAT8_CAPABILITY = (8, 9)  # Ada

_logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The device of EngineConfig.device. Raises StartupError, one line that says what to do, without one."""
    if name == "cpu":
        return torch.device("cpu")
    obstacle = _cuda_obstacle()
    if obstacle is None:
        _logger.info("device: %s", torch.cuda.get_device_name(0))
        return torch.device("cuda", 0)
    if name == "auto":
        _logger.info("device: cpu (%s)", obstacle)
        return torch.device("cpu")
    raise StartupError(f"There is no CUDA device to use: {obstacle}. Or use --device cpu.")


def require_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise StartupError where the device can't compute in this dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _BFLOAT16_CAPABILITY:
        raise StartupError(
            f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) "
            "can't compute in bfloat16; use --dtype fp16."
        )


def require_quantization(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise StartupError where the device has no kernels for EngineConfig.quantization."""
    if name == "int8" and device.type != "cpu":
        raise StartupError("--quantization int8 is for CPUs; use fp8, or --device cpu.")
    if name == "fp8":
        if device.type == "cpu":
            raise StartupError("--quantization fp8 is for GPUs; use int8 on a CPU.")
        if dtype != torch.bfloat16:
            raise StartupError("--quantization fp8 computes in bfloat16; use --dtype bf16.")
        require_float8(device)


def require_float8(device: torch.device) -> None:
    """Raise StartupError where the device is a GPU that can't convert 8-bit floats."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        raise StartupError(
            f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) has "
            "no 8-bit floats; leave --quantization fp8 and --kv-cache-dtype fp8 out."
        )


def multiplies_float8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats in less time than bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def _cuda_obstacle() -> str | None:
    """What keeps CUDA from being used and what to do about it; None if nothing does."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA; install one that is built with it"
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
            return _from_torch(str(error))
    return None


def _from_torch(message: str) -> str:
    """One line of what torch says, which for an old driver is a paragraph."""
    if "driver" in message and "too old" in message:
        return (
            f"the NVIDIA driver is too old for this torch, which needs CUDA {torch.version.cuda}; "
            "update the driver or install a torch for an older CUDA"
        )
    if "no NVIDIA driver" in message:
        return "no NVIDIA driver is found; install one and look at nvidia-smi"
    if "No CUDA GPUs" in message:
        return "the driver finds no GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    return (message.splitlines() or ["CUDA does not start"])[0]
