"""Settings of each process: checked where they are made, resolved once by the command line, then frozen.

The fields are the table of options (baton/option.py): a row is a field with its type, its flag, its default,
what --help says of it, and the values that it takes.
"""

import ipaddress
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from baton.core.errors import StartupError
from baton.core.kv_layout import FLOAT8, MODEL_DTYPES
from baton.core.reservation import TransferDeadlines
from baton.front_config import FrontConfig
from baton.option import REQUIRED, check_options, option
from baton.option_values import (
    ADDRESS,
    ADDRESSES,
    DEADLINES,
    FILE,
    NAMES,
    POSITIVE,
    RULE_NAMES,
    SECONDS,
    SHARE,
    SIZE,
    TEXT,
    TOKENS,
    aliased_choice,
    between,
    choice,
)
from baton.worker_sources import check_source, is_looked_at

Role = Literal["prefill", "decode", "both"]
DEFAULT_KV_CACHE_BYTES = 1 << 30
KV_TRANSPORTS = ("auto", "cuda_ipc", "grpc", "nccl", "nixl")

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DTYPES |= {"float": "float32", "half": "float16"}
_DTYPE = aliased_choice("dtype", _DTYPES | {name: name for name in MODEL_DTYPES})
_KV_CACHE_DTYPES = {"auto": "auto", "fp8": FLOAT8, "fp8_e4m3": FLOAT8, FLOAT8: FLOAT8}
_KV_CACHE_DTYPE = aliased_choice("KV cache dtype", _KV_CACHE_DTYPES)
_DEVICE = choice("device", "auto", "cpu", "cuda")
_QUANTIZATION = choice("quantization", "none", "int8", "fp8")
_STRUCTURED_OUTPUTS = choice("backend of structured outputs", "auto", "guidance", "xgrammar")
_ROLE = choice("role", *get_args(Role))
_KV_TRANSPORT = choice("KV transport", *KV_TRANSPORTS)
_LOG_LEVEL = replace(choice("log level", "debug", "info", "warning", "error"), read=str.lower)
_PORT = between(1, 65535)
_WILDCARD_HOSTS = {"0.0.0.0", "::"}


def _log_level() -> str:
    """A row of both configs: whatever a process does, it writes a log."""
    return option("--log-level", "info", "Least that is logged: debug, info, warning or error.", _LOG_LEVEL)


@dataclass(frozen=True)
class EngineConfig:
    """What one engine may use; raises StartupError where a value makes no sense."""

    dtype: str = option("--dtype", "auto", "bf16, fp16, fp32, or auto: as stored.", _DTYPE)
    block_size: int = option("--block-size", 16, "Tokens in a page of KV cache.", POSITIVE)
    kv_cache_bytes: int | None = option(
        "--kv-cache-memory",
        None,
        "Per worker, such as 512MiB or 4GiB.",
        SIZE,
        unset="1GiB; on a GPU what --gpu-memory-utilization leaves",
    )
    max_num_seqs: int = option("--max-num-seqs", 64, "Sequences that a worker runs at once.", POSITIVE)
    max_num_batched_tokens: int = option("--max-num-batched-tokens", 512, "Tokens in one step.", TOKENS)
    max_model_len: int | None = option(
        "--max-model-len",
        None,
        "Most tokens of prompt and answer, such as 8192 or 8K.",
        TOKENS,
        unset="as the model says",
    )
    # With many thousands OpenMP ends the process by SIGSEGV.
    num_threads: int = option("--threads", 1, "CPU threads of one step.", between(1, 4096), unset="all cores")
    cores_file: Path | None = option(
        "--share-cores",
        None,
        "Share the CPU threads of --threads with the workers of this machine that name the same file.",
        FILE,
        unset="not shared",
    )
    device: str = option("--device", "auto", "auto, cpu or cuda; auto: cuda where there is one.", _DEVICE)
    gpu_memory_utilization: float = option(
        "--gpu-memory-utilization",
        0.9,
        "On a GPU, of its memory for weights, steps and, without --kv-cache-memory, KV cache.",
        SHARE,
    )
    enforce_eager: bool = option("--enforce-eager", False, "On a GPU: without CUDA graphs.")
    quantization: str = option(
        "--quantization", "none", "Weights in 8 bits: int8 on CPUs, fp8 on GPUs; or none.", _QUANTIZATION
    )
    kv_cache_dtype: str = option(
        "--kv-cache-dtype",
        "auto",
        "fp8: KV cache in 8 bits, twice the tokens; auto: as --dtype.",
        _KV_CACHE_DTYPE,
    )

    logits_rules: tuple[str, ...] = option(
        "--logits-rule",
        (),
        "A rule for logits that requests may name: an entry point baton.logits_rules; may be repeated.",
        RULE_NAMES,
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class WorkerConfig:
    """One worker: a prefill server, a decode server, or one of both roles.

    Addresses are 'host:port', '[ipv6]:port' or 'unix:/path'.
    Without a cluster token a worker obeys whoever can connect to it, so StartupError is raised unless it
    listens on loopback or on a Unix socket.
    """

    role: Role = option("--role", REQUIRED, "prefill, decode or both.", _ROLE, unset="both")
    model_dir: Path = option("--model", REQUIRED, "Model directory or Hugging Face id.", TEXT)
    listen_address: str = option("--listen", REQUIRED, "HOST:PORT or unix:/PATH to listen on.", ADDRESS)
    advertise_address: str = option(
        "--advertise",
        REQUIRED,
        "Where the other servers reach this one.",
        ADDRESS,
        unset="as --listen, or this machine's own address",
    )
    worker_id: str = option("--worker-id", REQUIRED, "Name in logs and metrics.", unset="from the address")
    cluster_token: str = field(default="", repr=False)  # empty: none
    engine: EngineConfig = field(default_factory=EngineConfig)
    kv_transport: str = option(
        "--kv-transport",
        "auto",
        f"How KV pages travel: {', '.join(KV_TRANSPORTS)}; auto is the best that both servers have.",
        _KV_TRANSPORT,
    )
    transfer_stall_timeout_s: float = option(
        "--transfer-stall-timeout",
        30.0,
        "Give up a KV transfer when the other server takes, or sends, nothing for this long.",
        SECONDS,
    )
    transfer_deadlines: TransferDeadlines = option(
        "--transfer-deadline",
        TransferDeadlines(),
        "On decode: give up a KV transfer that brings nothing for this long; a prompt may wait so long "
        "for its turn on prefill.",
        DEADLINES,
    )
    log_level: str = _log_level()

    @property
    def asked_kv_transport(self) -> str | None:
        """The transport that is to be used; None: whichever is best."""
        return None if self.kv_transport == "auto" else self.kv_transport

    def __post_init__(self) -> None:
        check_options(self)
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


@dataclass(frozen=True)
class RouterConfig:
    """One router and the workers that it places requests on."""

    model_dir: Path = option(
        "--model",
        REQUIRED,
        "Model directory or Hugging Face id, as the workers'; its weights are not needed.",
        TEXT,
    )
    served_model_names: tuple[str, ...] = option(
        "--served-model-name",
        REQUIRED,
        "Model name in the API; with several, each is served and answers bear the first.",
        NAMES,
        unset="as the model is called",
    )
    prefill_addresses: tuple[str, ...] = option(
        "--prefill",
        (),
        "A prefill server; dns:NAME:PORT or file:/PATH for all that a name or a file has; may be repeated.",
        ADDRESSES,
    )
    decode_addresses: tuple[str, ...] = option(
        "--decode", (), "A decode server, or several as for --prefill; may be repeated.", ADDRESSES
    )
    worker_addresses: tuple[str, ...] = option(
        "--worker", (), "A worker of both roles, or several as for --prefill; may be repeated.", ADDRESSES
    )
    host: str = option("--host", "127.0.0.1", "Address that clients connect to; 0.0.0.0 for all.")
    http_port: int = option("--port", 8000, "Port of the HTTP API.", _PORT)
    grpc_port: int = option("--grpc-port", 8001, "Port of the gRPC API.", _PORT)
    max_queue: int = option("--max-queue", 4096, "Requests that may wait; more are refused.", POSITIVE)
    max_model_len: int | None = option(
        "--max-model-len",
        None,
        "Most tokens of prompt and answer, such as 8192 or 8K.",
        TOKENS,
        unset="as the workers say",
    )
    cluster_token: str = field(default="", repr=False)  # empty: none
    structured_outputs_backend: str = option(
        "--structured-outputs-backend",
        "auto",
        "What keeps answers in a form: guidance; or xgrammar, if workers have it; auto is guidance.",
        _STRUCTURED_OUTPUTS,
    )
    tool_call_parser: str = option(
        "--tool-call-parser", "auto", "How the model writes tool calls; auto: by its chat template; none."
    )
    reasoning_parser: str = option(
        "--reasoning-parser", "auto", "How the model marks its thinking; auto: by its chat template; none."
    )
    log_level: str = _log_level()
    front: FrontConfig = field(default_factory=FrontConfig)

    def __post_init__(self) -> None:
        check_options(self)
        for role, addresses in (("prefill", self.prefill_addresses), ("decode", self.decode_addresses)):
            if not addresses and not self.worker_addresses:
                raise StartupError(
                    f"a router needs at least one {role} server: name it with --{role} ADDRESS, "
                    "or a worker of both roles with --worker ADDRESS"
                )
        named = Counter((*self.prefill_addresses, *self.decode_addresses, *self.worker_addresses))
        for address, count in named.items():
            if is_looked_at(address):
                check_source(address)
            else:
                host_of(address)
            if count > 1:
                raise StartupError(
                    f"{address} is named {count} times: name each worker once, and one of both roles with "
                    "--worker ADDRESS"
                )
        require_two_ports(self.http_port, self.grpc_port)


def require_two_ports(http_port: int, grpc_port: int) -> None:
    """Raises StartupError where they are one."""
    if http_port == grpc_port:
        raise StartupError(f"HTTP and gRPC can't share port {http_port}: choose another with --grpc-port")


def available_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def worker_name(address: str) -> str:
    """What a worker is called that has no name: 'host:port', or its socket's file without ending."""
    return Path(address).stem if host_of(address) is None else address


def is_local(address: str) -> bool:
    """Whether only this machine can connect to `address`. Raises StartupError if it is no address."""
    host = host_of(address)
    return host is None or is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
