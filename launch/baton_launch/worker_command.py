"""`baton prefill`, `baton decode` and `baton worker`: one worker process."""

import inspect
from collections.abc import Callable
from typing import Annotated, cast

import typer

from baton.config import EngineConfig, Role, WorkerConfig, available_cores
from baton.core.reservation import TransferDeadlines
from baton_launch import options
from baton_launch.logging_setup import set_up_logging
from baton_launch.model_source import find_model
from baton_launch.options import DEFAULT_ENGINE
from baton_launch.parent_death import exit_with_parent as die_with_parent

Model = Annotated[str, typer.Option(help="Model directory or Hugging Face id.")]
ChosenRole = Annotated[str, typer.Option("--role", metavar="ROLE", help="prefill, decode or both.")]
Listen = Annotated[str, typer.Option(metavar="ADDRESS", help="HOST:PORT or unix:/PATH to listen on.")]
Advertise = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Where the other servers reach this one.", show_default="as --listen"
    ),
]
WorkerId = Annotated[str | None, typer.Option(help="Name in logs.", show_default="from the address")]
Threads = Annotated[
    int | None,
    # With many thousands OpenMP ends the process by SIGSEGV.
    typer.Option("--threads", min=1, max=4096, help="CPU threads of one step.", show_default="all cores"),
]


def worker_command(fixed_role: Role | None = None) -> Callable[..., None]:
    """The command that runs one worker of this role; without one, `--role` names it."""

    def command(
        model: Model,
        listen: Listen,
        role: ChosenRole = fixed_role or "both",
        advertise: Advertise = None,
        worker_id: WorkerId = None,
        dtype: options.EngineDtype = DEFAULT_ENGINE.dtype,
        block_size: options.BlockSize = DEFAULT_ENGINE.block_size,
        kv_cache_memory: options.KVCacheMemory = None,
        max_num_seqs: options.MaxNumSeqs = DEFAULT_ENGINE.max_num_seqs,
        max_num_batched_tokens: options.MaxNumBatchedTokens = DEFAULT_ENGINE.max_num_batched_tokens,
        max_model_len: options.MaxModelLen = None,
        threads: Threads = None,
        device: options.Device = DEFAULT_ENGINE.device,
        gpu_memory_utilization: options.GpuMemoryUtilization = DEFAULT_ENGINE.gpu_memory_utilization,
        enforce_eager: options.EnforceEager = False,
        quantization: options.Quantization = DEFAULT_ENGINE.quantization,
        kv_cache_dtype: options.KVCacheDtype = DEFAULT_ENGINE.kv_cache_dtype,
        share_cores: options.ShareCores = None,
        kv_transport: options.KVTransport = WorkerConfig.kv_transport,
        transfer_stall_timeout: options.TransferStallTimeout = WorkerConfig.transfer_stall_timeout_s,
        transfer_deadline: options.TransferDeadline = options.DEFAULT_TRANSFER_DEADLINE_S,
        exit_with_parent: options.ExitWithParent = None,
    ) -> None:
        if exit_with_parent is not None:
            die_with_parent(exit_with_parent)
        engine = options.engine_config(
            dtype,
            block_size,
            kv_cache_memory,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            threads or available_cores(),
            device,
            gpu_memory_utilization,
            enforce_eager,
            share_cores,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
        )
        transfers = (kv_transport, transfer_stall_timeout, transfer_deadline)
        # What is no role, WorkerConfig refuses.
        run_worker(worker_config(cast(Role, role), model, listen, advertise, worker_id, engine, *transfers))

    if fixed_role is not None:
        _hide_parameter(command, "role")
    return command


def worker_config(
    role: Role,
    model: str,
    listen: str,
    advertise: str | None,
    worker_id: str | None,
    engine: EngineConfig,
    kv_transport: str = WorkerConfig.kv_transport,
    transfer_stall_timeout_s: float = WorkerConfig.transfer_stall_timeout_s,
    transfer_deadline_s: float = options.DEFAULT_TRANSFER_DEADLINE_S,
) -> WorkerConfig:
    """The settings that the options spell; raises StartupError."""
    advertise = advertise or listen
    return WorkerConfig(
        role=role,
        model_dir=find_model(model).directory,
        listen_address=listen,
        advertise_address=advertise,
        worker_id=worker_id or f"{role}@{advertise}",
        cluster_token=options.cluster_token(),
        engine=engine,
        kv_transport=kv_transport,
        transfer_stall_timeout_s=transfer_stall_timeout_s,
        transfer_deadlines=TransferDeadlines.at_most(transfer_deadline_s),
    )


def run_worker(config: WorkerConfig) -> None:
    """Serve until the process is asked to stop."""
    set_up_logging()
    if config.role == "prefill":
        from baton_prefill_service.main import run
    elif config.role == "decode":
        from baton_decode_service.main import run
    else:
        from baton_both_service.main import run
    run(config)


def _hide_parameter(command: Callable[..., None], name: str) -> None:
    """Let Typer, which goes by signatures, make no option of a parameter that has a default."""
    signature = inspect.signature(command)
    shown = [parameter for parameter in signature.parameters.values() if parameter.name != name]
    command.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
