"""Command-line options that more than one command has, and what becomes of them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from baton.config import KV_TRANSPORTS, EngineConfig, parse_dtype, parse_kv_cache_dtype, parse_size
from baton.core.errors import StartupError
from baton.core.reservation import TransferDeadlines

EngineDtype = Annotated[str, typer.Option("--dtype", help="bf16, fp16, fp32, or auto: as stored.")]
Quantization = Annotated[
    str,
    typer.Option(
        "--quantization", metavar="NAME", help="Weights in 8 bits: int8 on CPUs, fp8 on GPUs; or none."
    ),
]
KVCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="NAME",
        help="fp8: KV cache in 8 bits, twice the tokens; auto: as --dtype.",
    ),
]
BlockSize = Annotated[int, typer.Option("--block-size", help="Tokens in a page of KV cache.")]
KVCacheMemory = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-memory",
        help="Per worker, such as 512MiB or 4GiB.",
        show_default="1GiB; on a GPU what --gpu-memory-utilization leaves",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda; auto: cuda where there is one.")
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="On a GPU, of its memory for weights, steps and, without --kv-cache-memory, KV cache.",
    ),
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="On a GPU: without CUDA graphs.")]
MaxNumSeqs = Annotated[int, typer.Option("--max-num-seqs", help="Sequences that a worker runs at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option("--max-num-batched-tokens", help="Tokens in one step.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len", help="Most tokens of prompt and answer.", show_default="as the model says"
    ),
]
KVTransport = Annotated[
    str,
    typer.Option(
        "--kv-transport",
        metavar="NAME",
        help=f"How KV pages travel: {', '.join(KV_TRANSPORTS)}; auto is the best that both servers have.",
    ),
]
TransferStallTimeout = Annotated[
    float,
    typer.Option(
        "--transfer-stall-timeout",
        metavar="SECONDS",
        help="Give up a KV transfer when the other server takes, or sends, nothing for this long.",
    ),
]
TransferDeadline = Annotated[
    float,
    typer.Option(
        "--transfer-deadline",
        metavar="SECONDS",
        help="On decode: give up a KV transfer that brings nothing for this long; a prompt may wait so long "
        "for its turn on prefill.",
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option("--served-model-name", help="Model name in the API.", show_default="as the model is called"),
]
HttpHost = Annotated[str, typer.Option("--host", help="Address that clients connect to; 0.0.0.0 for all.")]
HttpPort = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the HTTP API.")]
GrpcPort = Annotated[int, typer.Option("--grpc-port", min=1, max=65535, help="Port of the gRPC API.")]
ShareCores = Annotated[
    Path | None,
    typer.Option(
        "--share-cores",
        metavar="FILE",
        help="Share the CPU threads of --threads with the workers of this machine that name the same file.",
        show_default="not shared",
    ),
]
ExitWithParent = Annotated[int | None, typer.Option("--exit-with-parent", hidden=True, metavar="PID")]

DEFAULT_ENGINE = EngineConfig()
DEFAULT_TRANSFER_DEADLINE_S = TransferDeadlines().receiving_s


def engine_config(
    dtype: str,
    block_size: int,
    kv_cache_memory: str | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int | None,
    num_threads: int,
    device: str = EngineConfig.device,
    gpu_memory_utilization: float = EngineConfig.gpu_memory_utilization,
    enforce_eager: bool = EngineConfig.enforce_eager,
    cores_file: Path | None = None,
    quantization: str = EngineConfig.quantization,
    kv_cache_dtype: str = EngineConfig.kv_cache_dtype,
) -> EngineConfig:
    """The engine settings that the options spell; raises StartupError."""
    return EngineConfig(
        dtype=parse_dtype(dtype),
        block_size=block_size,
        kv_cache_bytes=None if kv_cache_memory is None else parse_size(kv_cache_memory),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        num_threads=num_threads,
        device=device,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        cores_file=cores_file,
        quantization=quantization,
        kv_cache_dtype=parse_kv_cache_dtype(kv_cache_dtype),
    )


def engine_arguments(engine: EngineConfig) -> list[str]:
    """The options that spell `engine`; the inverse of `engine_config`."""
    arguments = [
        f"--dtype={engine.dtype}",
        f"--block-size={engine.block_size}",
        f"--max-num-seqs={engine.max_num_seqs}",
        f"--max-num-batched-tokens={engine.max_num_batched_tokens}",
        f"--threads={engine.num_threads}",
        f"--device={engine.device}",
        f"--gpu-memory-utilization={engine.gpu_memory_utilization}",
        f"--quantization={engine.quantization}",
        f"--kv-cache-dtype={engine.kv_cache_dtype}",
    ]
    if engine.enforce_eager:
        arguments.append("--enforce-eager")
    if engine.cores_file is not None:
        arguments.append(f"--share-cores={engine.cores_file}")
    if engine.kv_cache_bytes is not None:
        arguments.append(f"--kv-cache-memory={engine.kv_cache_bytes}")
    if engine.max_model_len is not None:
        arguments.append(f"--max-model-len={engine.max_model_len}")
    return arguments


def cluster_token() -> str:
    """The secret that routers and workers share; empty if there is none. Raises StartupError.

    It comes by the environment because other users can read a process's arguments. White space around it is
    not of it: secrets that come from files often end in a line feed.
    """
    token = os.environ.get("BATON_CLUSTER_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):  # all that a header of HTTP/2 may hold
        raise StartupError("BATON_CLUSTER_TOKEN may hold printable ASCII characters only")
    return token
