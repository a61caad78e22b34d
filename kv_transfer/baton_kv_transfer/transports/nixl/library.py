"""The NIXL library: loaded when it is first needed, with the settings that a server needs.

Agents are made through NIXL's bindings and not through its `nixl_agent`, which fixes how the progress thread
waits: with a delay of 0, which is a core spent on nothing.
"""

import importlib
import importlib.util
import logging
import os
import secrets
from functools import cache
from typing import Any

import numpy as np

from baton.core.errors import StartupError

# One wheel for each version of CUDA; each of them also serves memory of the CPU on machines without CUDA.
_MODULES = ("nixl_cu13", "nixl_cu12")

# What can be set through the environment alone, and is read when the library is loaded or an agent is made.
# What the environment has already stays.
_ENVIRONMENT = {
    # Both write to stdout, NIXL even what goes well.
    "NIXL_LOG_LEVEL": "ERROR",
    "UCX_LOG_LEVEL": "error",
    "UCX_LOG_FILE": "stderr",
    # UCX would take SIGHUP, and stop the process there to wait for a debugger, and the signals of a crash.
    "UCX_DEBUG_SIGNO": "0",
    "UCX_ERROR_SIGNALS": "",
    # Serves the processes' inner state to debuggers from a thread of its own.
    "UCX_VFS_ENABLE": "n",
}

# Without a way to read remote memory directly (RDMA, or the system's for processes on one machine) UCX reads
# by messages that the other side answers. An answer whose reader has died ends the process that gives it
# (UCX's ucp_request.inl: "Fatal: unexpected error"). With this such reads fail, and gRPC carries the pages.
_ENGINE_CONFIG = "PROTO_EMULATION_ENABLE=n"

# A progress thread sleeps until something comes. In this interval, in microseconds, it looks unasked:
# NIXL's authors have seen wake-ups that did not come.
_PROGRESS_INTERVAL_US = 100_000


def why_unavailable() -> str | None:
    """What to do before NIXL can be used; None where it is installed. Loads nothing."""
    if any(importlib.util.find_spec(name) for name in _MODULES):
        return None
    return "NIXL is not installed: pip install 'baton-serve[nixl]'"


def is_available() -> bool:
    """Whether NIXL is installed. Whether two servers can use it, only a read between them shows."""
    return why_unavailable() is None


@cache
def load() -> Any:
    """NIXL's bindings. Raises StartupError where they are not installed or can't be loaded."""
    if (reason := why_unavailable()) is not None:
        raise StartupError(reason)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = next(name for name in _MODULES if importlib.util.find_spec(name))
    raise_exceptions = logging.raiseExceptions
    try:
        return importlib.import_module(f"{name}._bindings")
    except ImportError as error:
        raise StartupError(f"NIXL can't be loaded: {error}") from error
    finally:
        logging.raiseExceptions = raise_exceptions  # that NIXL clears for the whole process


def new_agent(*, has_progress_thread: bool) -> Any:
    """An agent with a name of its own and a UCX backend. It ends when nothing refers to it any more.

    Without a progress thread it moves bytes, and answers others, only while it is asked for a read's state.
    Takes tens of milliseconds, most of them without the interpreter's lock; a process' first half a second.
    Raises StartupError where there is none to be had.
    """
    bindings = load()
    try:
        config = bindings.nixlAgentConfig()
        config.useProgThread = has_progress_thread
        config.pthrDelay = _PROGRESS_INTERVAL_US
        agent = bindings.nixlAgent(f"baton-{secrets.token_hex(8)}", config)
        agent.createBackend("UCX", {"engine_config": _ENGINE_CONFIG})
    except Exception as error:  # what NIXL raises has no other base
        raise StartupError(f"NIXL does not start: {error}") from error
    return agent


def register(agent: Any, memory: Any, gpu_index: int | None = None) -> None:
    """Let `agent` use memory, which has to stay where it is as long as the agent is: bytes of the CPU, or
    with `gpu_index` a tensor of bytes on that GPU.

    Raises StartupError where the system does not let it, as by a limit on locked memory.
    """
    bindings = load()
    descriptor = (address_of(memory), memory.nbytes, gpu_index or 0, "")
    try:
        agent.registerMem(bindings.nixlRegDList(segment(gpu_index), [descriptor]), [])
    except Exception as error:
        raise StartupError(f"NIXL can't register {memory.nbytes} bytes: {error}") from error


def segment(gpu_index: int | None) -> Any:
    """NIXL's word for memory of a GPU, or of the CPU."""
    bindings = load()
    return bindings.DRAM_SEG if gpu_index is None else bindings.VRAM_SEG


def address_of(memory: Any) -> int:
    """Where contiguous memory, or a tensor on a GPU, begins."""
    if hasattr(memory, "data_ptr"):
        return int(memory.data_ptr())
    return np.frombuffer(memory, np.uint8).ctypes.data
