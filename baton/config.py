"""Settings of each process: checked where they are made, resolved once by the command line, then frozen."""

import ipaddress
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from baton.core.errors import StartupError
from baton.core.kv_layout import FLOAT8, MODEL_DTYPES
from baton.core.reservation import TransferDeadlines

Role = Literal["prefill", "decode", "both"]
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("none", "int8", "fp8")
KV_TRANSPORTS = ("auto", "cuda_ipc", "grpc", "nccl", "nixl")

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"} | {
    name: name for name in MODEL_DTYPES
}
_KV_CACHE_DTYPES = {"auto": "auto", "fp8": FLOAT8, FLOAT8: FLOAT8}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)
_SIZE_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
DEFAULT_KV_CACHE_BYTES = 1 << 30
_WILDCARD_HOSTS = {"0.0.0.0", "::"}


@dataclass(frozen=True)
class EngineConfig:
    """What one engine may use; raises StartupError where a value makes no sense."""

    dtype: str = "auto"  # "auto": the checkpoint's own; else one of MODEL_DTYPES
    block_size: int = 16  # tokens a page
    kv_cache_bytes: int | None = None  # None: DEFAULT_KV_CACHE_BYTES, on a GPU what is left there
    max_num_seqs: int = 64  # sequences that run at once
    max_num_batched_tokens: int = 512  # tokens of one step
    max_model_len: int | None = None  # None: as the model's config says
    num_threads: int = 1  # CPU threads of one step, at most
    cores_file: Path | None = None  # workers that name the same share those cores; None: not shared
    device: str = "auto"  # "auto": cuda where there is one; else one of DEVICES
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for weights, steps and KV cache
    enforce_eager: bool = False  # no CUDA graphs
    quantization: str = "none"  # of weights; one of QUANTIZATIONS
    kv_cache_dtype: str = "auto"  # "auto": as the model computes; else FLOAT8

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in MODEL_DTYPES:
            raise StartupError(f"unknown dtype '{self.dtype}': use auto, {', '.join(MODEL_DTYPES)}")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "num_threads"):
            _require_positive(name, getattr(self, name))
        for name in ("kv_cache_bytes", "max_model_len"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.kv_cache_dtype not in ("auto", FLOAT8):
            raise StartupError(f"unknown KV cache dtype '{self.kv_cache_dtype}': use auto, {FLOAT8}")
        if self.device not in DEVICES:
            raise StartupError(f"unknown device '{self.device}': use {', '.join(DEVICES)}")
        if self.quantization not in QUANTIZATIONS:
            raise StartupError(f"unknown quantization '{self.quantization}': use {', '.join(QUANTIZATIONS)}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise StartupError(
                f"gpu-memory-utilization must be above 0 and at most 1, but is {self.gpu_memory_utilization}"
            )


@dataclass(frozen=True)
class WorkerConfig:
    """One worker: a prefill server, a decode server, or one of both roles.

    Addresses are 'host:port', '[ipv6]:port' or 'unix:/path'.
    Without a cluster token a worker obeys whoever can connect to it, so StartupError is raised unless it
    listens on loopback or on a Unix socket.
    """

    role: Role
    model_dir: Path
    listen_address: str
    advertise_address: str  # where the other servers reach it
    worker_id: str
    cluster_token: str = field(default="", repr=False)  # empty: none
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv_transport: str = "auto"  # one of KV_TRANSPORTS; "auto": the best that both workers have
    transfer_stall_timeout_s: float = 30.0  # a decode server that takes nothing for so long is given up
    transfer_deadlines: TransferDeadlines = field(default_factory=TransferDeadlines)  # of a decode server

    @property
    def asked_kv_transport(self) -> str | None:
        """The transport that is to be used; None: whichever is best."""
        return None if self.kv_transport == "auto" else self.kv_transport

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise StartupError(f"unknown role '{self.role}': use {', '.join(get_args(Role))}")
        require_kv_transport(self.kv_transport)
        if host_of(self.advertise_address) in _WILDCARD_HOSTS:
            raise StartupError(
                f"other servers can't connect to {self.advertise_address}: "
                "give the address that they reach this one at with --advertise"
            )
        if not self.cluster_token and not is_local(self.listen_address):
            raise StartupError(
                f"listening on {self.listen_address} needs a secret that the cluster shares: "
                "set BATON_CLUSTER_TOKEN, the same for the router and every worker"
            )
        _require_seconds("transfer-stall-timeout", self.transfer_stall_timeout_s)
        _require_seconds("transfer-deadline", self.transfer_deadlines.receiving_s)


@dataclass(frozen=True)
class RouterConfig:
    """One router and the workers that it places requests on."""

    model_dir: Path
    served_model_name: str
    prefill_addresses: tuple[str, ...]
    decode_addresses: tuple[str, ...]
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    max_queue: int = 256  # requests that wait for a worker; more are refused
    max_model_len: int | None = None  # None: as the workers say
    cluster_token: str = field(default="", repr=False)  # empty: none
    worker_addresses: tuple[str, ...] = ()  # of workers of both roles

    def __post_init__(self) -> None:
        for role, addresses in (("prefill", self.prefill_addresses), ("decode", self.decode_addresses)):
            if not addresses and not self.worker_addresses:
                raise StartupError(
                    f"a router needs at least one {role} server: name it with --{role} ADDRESS, "
                    "or a worker of both roles with --worker ADDRESS"
                )
        named = Counter((*self.prefill_addresses, *self.decode_addresses, *self.worker_addresses))
        for address, count in named.items():
            host_of(address)
            if count > 1:
                raise StartupError(
                    f"{address} is named {count} times: name each worker once, and one of both roles with "
                    "--worker ADDRESS"
                )
        if self.http_port == self.grpc_port:
            raise StartupError(f"HTTP and gRPC can't share port {self.http_port}: choose another --grpc-port")
        _require_positive("max_queue", self.max_queue)
        if self.max_model_len is not None:
            _require_positive("max_model_len", self.max_model_len)


def available_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_kv_transport(name: str) -> None:
    """Raises StartupError unless there is a transport of this name."""
    if name not in KV_TRANSPORTS:
        raise StartupError(f"unknown KV transport '{name}': use {', '.join(KV_TRANSPORTS)}")


def parse_dtype(text: str) -> str:
    """'auto' or one of MODEL_DTYPES, of which bf16, fp16 and fp32 are short forms. Raises StartupError."""
    if text not in _DTYPES:
        raise StartupError(f"unknown dtype '{text}': use {', '.join(_DTYPES)}")
    return _DTYPES[text]


def parse_kv_cache_dtype(text: str) -> str:
    """'auto' or FLOAT8, which is fp8 for short. Raises StartupError."""
    if text not in _KV_CACHE_DTYPES:
        raise StartupError(f"unknown KV cache dtype '{text}': use {', '.join(_KV_CACHE_DTYPES)}")
    return _KV_CACHE_DTYPES[text]


def parse_size(text: str) -> int:
    """Bytes of '1GiB', '512MiB', '2G', '1.5g' or '1048576'; units are powers of 1024, as memory comes.

    Raises StartupError on anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        number, unit, _ = match.groups()
        size = int(float(number) * 1024 ** _SIZE_EXPONENTS[unit.lower()])
    if size < 1:
        raise StartupError(f"'{text}' is not a size: write it like 1GiB, 512MiB or 1073741824")
    return size


def host_of(address: str) -> str | None:
    """The host of 'host:port' or '[ipv6]:port', None for 'unix:/path'; StartupError if it is neither."""
    if address.startswith("unix:/"):
        return None
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not host or (":" in host and not bracketed) or not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise StartupError(f"'{address}' is not an address: write HOST:PORT or unix:/PATH")
    return host


def is_local(address: str) -> bool:
    """Whether only this machine can connect to `address`. Raises StartupError if it is no address."""
    host = host_of(address)
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise StartupError(f"{name.replace('_', '-')} must be at least 1, but is {value}")


def _require_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise StartupError(f"{name} must be a number of seconds above 0, but is {value}")
