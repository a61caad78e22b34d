"""`baton serve`: a router with its workers on this machine, as one command."""

import asyncio
import json
import os
import secrets
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.config import EngineConfig, RouterConfig, WorkerConfig, available_cores, require_kv_transport
from baton.core.errors import StartupError
from baton_launch import options
from baton_launch.model_source import ModelSource, find_model
from baton_launch.options import DEFAULT_ENGINE

if TYPE_CHECKING:
    from baton_launch.supervisor import ChildSpec, Supervisor

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Model directory or Hugging Face id.", show_default="the shipped model"
    ),
]
NumPrefill = Annotated[
    int | None, typer.Option("--prefill", min=1, help="Number of prefill servers.", show_default="1")
]
NumDecode = Annotated[
    int | None, typer.Option("--decode", min=1, help="Number of decode servers.", show_default="1")
]
ServeRole = Annotated[
    str | None,
    typer.Option(
        "--role", metavar="both", help="Workers of both roles, instead of prefill and decode servers."
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Number of workers, with --role both.", show_default="1"),
]


@dataclass(frozen=True, slots=True)
class ServePlan:
    """All that decides which processes `baton serve` starts, and with which options."""

    model: ModelSource
    served_model_name: str
    workers: Mapping[str, int]  # how many, by the command that runs one: prefill, decode or worker
    host: str
    http_port: int
    grpc_port: int
    engine: EngineConfig
    kv_transport: str = WorkerConfig.kv_transport


def serve(
    model: Model = None,
    prefill: NumPrefill = None,
    decode: NumDecode = None,
    role: ServeRole = None,
    workers: NumWorkers = None,
    host: options.HttpHost = RouterConfig.host,
    port: options.HttpPort = RouterConfig.http_port,
    grpc_port: options.GrpcPort = RouterConfig.grpc_port,
    served_model_name: options.ServedModelName = None,
    dtype: options.EngineDtype = DEFAULT_ENGINE.dtype,
    max_model_len: options.MaxModelLen = None,
    block_size: options.BlockSize = DEFAULT_ENGINE.block_size,
    kv_cache_memory: options.KVCacheMemory = None,
    max_num_seqs: options.MaxNumSeqs = DEFAULT_ENGINE.max_num_seqs,
    max_num_batched_tokens: options.MaxNumBatchedTokens = DEFAULT_ENGINE.max_num_batched_tokens,
    device: options.Device = DEFAULT_ENGINE.device,
    gpu_memory_utilization: options.GpuMemoryUtilization = DEFAULT_ENGINE.gpu_memory_utilization,
    enforce_eager: options.EnforceEager = False,
    quantization: options.Quantization = DEFAULT_ENGINE.quantization,
    kv_cache_dtype: options.KVCacheDtype = DEFAULT_ENGINE.kv_cache_dtype,
    kv_transport: options.KVTransport = WorkerConfig.kv_transport,
) -> None:
    """Serve a model on this machine, until Ctrl-C: a router, prefill servers and decode servers."""
    from baton_launch.listening import require_free_port

    counts = worker_counts(role, prefill, decode, workers)
    engine = options.engine_config(
        dtype,
        block_size,
        kv_cache_memory,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        available_cores(),
        device,
        gpu_memory_utilization,
        enforce_eager,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    if port == grpc_port:
        raise StartupError(f"HTTP and gRPC can't share port {port}: choose another with --grpc-port")
    require_kv_transport(kv_transport)
    require_free_port(host, port, "--port")
    require_free_port(host, grpc_port, "--grpc-port")
    source = find_model(model)
    name = served_model_name or source.name
    run_plan(ServePlan(source, name, counts, host, port, grpc_port, engine, kv_transport))


def worker_counts(
    role: str | None, prefill: int | None, decode: int | None, workers: int | None
) -> dict[str, int]:
    """How many workers the options ask for, by the command that runs one; raises StartupError."""
    if role is None:
        if workers is not None:
            raise StartupError("--workers goes with --role both; else use --prefill and --decode")
        return {"prefill": prefill or 1, "decode": decode or 1}
    if role != "both":
        raise StartupError(f"unknown role '{role}': use both, or --prefill and --decode without --role")
    if prefill is not None or decode is not None:
        raise StartupError("--prefill and --decode don't go with --role both: use --workers")
    return {"worker": workers or 1}


def run_plan(plan: ServePlan) -> None:
    """Start the processes of the plan and stay until they are stopped; StartupError if they don't start."""
    from baton_launch.console import ConsoleReporter
    from baton_launch.listening import answers_ok, reachable_host
    from baton_launch.supervisor import Supervisor

    async def is_ready() -> bool:
        host = reachable_host(plan.host).strip("[]")
        return await asyncio.to_thread(answers_ok, host, plan.http_port, "/health")

    with tempfile.TemporaryDirectory(prefix="baton-", ignore_cleanup_errors=True) as directory:
        sockets = worker_sockets(plan, Path(directory))
        reporter = ConsoleReporter({**sockets, "router": None}, banner(plan))
        supervisor = Supervisor(child_specs(plan, sockets), is_ready, reporter)
        reporter.notice(f"starting {', '.join(sockets)} and the router with {plan.model.directory}")
        try:
            asyncio.run(_run_until_signalled(supervisor))
        finally:
            reporter.close()


async def _run_until_signalled(supervisor: "Supervisor") -> None:
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored by nohup, to outlive the terminal
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, supervisor.stop)
    await supervisor.run()


def worker_sockets(plan: ServePlan, directory: Path) -> dict[str, Path]:
    """The Unix socket of each worker, by the worker's name."""
    names = [f"{command}-{index}" for command, count in plan.workers.items() for index in range(count)]
    return {name: directory / f"{name}.sock" for name in names}


def child_specs(plan: ServePlan, sockets: dict[str, Path]) -> list["ChildSpec"]:
    """How to start every process; all share a new secret, and end with this process."""
    from baton_launch.supervisor import ChildSpec

    environment = {**os.environ, "BATON_CLUSTER_TOKEN": secrets.token_urlsafe(32)}
    common = [f"--model={plan.model.directory}", f"--exit-with-parent={os.getpid()}"]
    children = {"router": ["router", *common, *router_arguments(plan, sockets)]}
    engine = plan.engine
    if len(sockets) > 1:  # they share the machine
        engine = replace(
            engine,
            cores_file=next(iter(sockets.values())).with_name("cores"),
            gpu_memory_utilization=engine.gpu_memory_utilization / len(sockets),
        )
    for name, socket in sockets.items():
        command = name.partition("-")[0]
        own = [f"--listen=unix:{socket}", f"--worker-id={name}", f"--kv-transport={plan.kv_transport}"]
        children[name] = [command, *common, *own, *options.engine_arguments(engine)]
    # -P: else files in the directory that a person happens to be in, such as a router.py, hide Baton's.
    program = (sys.executable, "-P", "-m", "baton_launch.main")
    return [ChildSpec(name, (*program, *arguments), environment) for name, arguments in children.items()]


def router_arguments(plan: ServePlan, sockets: dict[str, Path]) -> list[str]:
    """The router's own options."""
    arguments = [
        f"--host={plan.host}",
        f"--port={plan.http_port}",
        f"--grpc-port={plan.grpc_port}",
        f"--served-model-name={plan.served_model_name}",
    ]
    if plan.engine.max_model_len is not None:
        arguments.append(f"--max-model-len={plan.engine.max_model_len}")
    return arguments + [f"--{name.partition('-')[0]}=unix:{socket}" for name, socket in sockets.items()]


def banner(plan: ServePlan) -> str:
    """What a person needs once all is ready; the curl line works as pasted into a shell."""
    from baton_launch.listening import reachable_host

    host = reachable_host(plan.host)
    url = f"http://{host}:{plan.http_port}"
    body = json.dumps({"model": plan.served_model_name, "prompt": "def fibonacci(n):", "max_tokens": 64})
    return "\n".join(
        (
            "",
            f"  Baton serves {plan.served_model_name}. Ctrl-C stops it.",
            "",
            f"  HTTP   {url}/v1  (OpenAI's API)",
            f"  gRPC   {host}:{plan.grpc_port}",
            f"  Docs   {url}/docs",
            f"  Chat   baton chat --url {url}",
            "",
            f"curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "",
        )
    )
