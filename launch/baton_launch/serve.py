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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.config import RouterConfig, WorkerConfig, available_cores, require_two_ports
from baton.core.errors import StartupError
from baton.option import arguments_of, make_config, settings_of
from baton_launch.config_file import environment_of_children
from baton_launch.foreign_options import answers_foreign_options
from baton_launch.model_source import ModelSource, find_model
from baton_launch.options import takes_options

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

# Who its processes are and where they listen, `baton serve` decides by itself.
DECIDED_HERE = frozenset(
    {"model_dir", "role", "listen_address", "advertise_address", "worker_id", "cores_file"}
    | {"prefill_addresses", "decode_addresses", "worker_addresses"}
)
_SETTINGS = {
    setting.field: setting
    for setting in (*settings_of(RouterConfig), *settings_of(WorkerConfig))
    if setting.field not in DECIDED_HERE
}


@dataclass(frozen=True, slots=True)
class ServePlan:
    """The processes that `baton serve` starts."""

    router: RouterConfig
    workers: Mapping[str, WorkerConfig]  # by name; each listens on a Unix socket


@answers_foreign_options()
@takes_options(_SETTINGS.values())
def serve(
    model: Model = None,
    prefill: NumPrefill = None,
    decode: NumDecode = None,
    role: ServeRole = None,
    workers: NumWorkers = None,
    **values: Any,
) -> None:
    """Serve a model on this machine, until Ctrl-C: a router, prefill servers and decode servers."""
    from baton_launch.listening import require_free_port

    counts = worker_counts(role, prefill, decode, workers)
    host, port, grpc_port = values["host"], values["http_port"], values["grpc_port"]
    require_two_ports(port, grpc_port)
    require_free_port(host, port, "--port")
    require_free_port(host, grpc_port, "--grpc-port")
    source = find_model(model)
    with tempfile.TemporaryDirectory(prefix="baton-", ignore_cleanup_errors=True) as directory:
        run_plan(serve_plan(source, counts, Path(directory), values))


def worker_counts(
    role: str | None, prefill: int | None, decode: int | None, workers: int | None
) -> dict[str, int]:
    """How many workers the options ask for, by kind: prefill, decode or worker; raises StartupError."""
    if role is None:
        if workers is not None:
            raise StartupError("--workers goes with --role both; else use --prefill and --decode")
        return {"prefill": prefill or 1, "decode": decode or 1}
    if role != "both":
        raise StartupError(f"unknown role '{role}': use both, or --prefill and --decode without --role")
    if prefill is not None or decode is not None:
        raise StartupError("--prefill and --decode don't go with --role both: use --workers")
    return {"worker": workers or 1}


def serve_plan(
    source: ModelSource, counts: Mapping[str, int], directory: Path, values: Mapping[str, Any]
) -> ServePlan:
    """A router and so many workers of each kind, with sockets in the directory and a new secret.

    `values` are what the options say, by field. Raises StartupError.
    """
    num_workers = sum(counts.values())
    common = {
        "num_threads": available_cores(),
        **values,
        "model_dir": source.directory,
        "served_model_names": values.get("served_model_names") or (source.name,),
        "cluster_token": secrets.token_urlsafe(32),
    }
    if num_workers > 1:  # they share the machine
        common["cores_file"] = directory / "cores"
        common["gpu_memory_utilization"] /= num_workers
    workers: dict[str, WorkerConfig] = {}
    addresses: dict[str, tuple[str, ...]] = {}
    for kind, count in counts.items():
        own = {f"{kind}-{index}": f"unix:{directory}/{kind}-{index}.sock" for index in range(count)}
        for name, address in own.items():
            place = {"listen_address": address, "advertise_address": address, "worker_id": name}
            role = "both" if kind == "worker" else kind
            workers[name] = make_config(WorkerConfig, {**common, **place, "role": role})
        addresses[f"{kind}_addresses"] = tuple(own.values())
    return ServePlan(make_config(RouterConfig, {**common, **addresses}), workers)


def run_plan(plan: ServePlan) -> None:
    """Start the processes of the plan and stay until they are stopped; StartupError if they don't start."""
    from baton_launch.console import ConsoleReporter
    from baton_launch.listening import answers_ok, reachable_host
    from baton_launch.supervisor import Supervisor

    async def is_ready() -> bool:
        host = reachable_host(plan.router.host).strip("[]")
        return await asyncio.to_thread(answers_ok, host, plan.router.http_port, "/health")

    sockets = {
        name: Path(worker.listen_address.removeprefix("unix:")) for name, worker in plan.workers.items()
    }
    reporter = ConsoleReporter({**sockets, "router": None}, banner(plan.router))
    supervisor = Supervisor(child_specs(plan), is_ready, reporter)
    reporter.notice(f"starting {', '.join(sockets)} and the router with {plan.router.model_dir}")
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


def child_specs(plan: ServePlan) -> list["ChildSpec"]:
    """How to start every process; all share the secret, and end with this process."""
    from baton_launch.supervisor import ChildSpec

    environment = {**environment_of_children(), "BATON_CLUSTER_TOKEN": plan.router.cluster_token}
    # -P: else files in the directory that a person happens to be in, such as a router.py, hide Baton's.
    program = (sys.executable, "-P", "-m", "baton")
    children = {
        "router": ["router", *arguments_of(plan.router)],
        **{name: ["worker", *arguments_of(worker)] for name, worker in plan.workers.items()},
    }
    ours = f"--exit-with-parent={os.getpid()}"
    return [
        ChildSpec(name, (*program, *child, ours), environment, finishes=name == "router")
        for name, child in children.items()
    ]


def banner(router: RouterConfig) -> str:
    """What a person needs once all is ready; the curl line works as pasted into a shell."""
    from baton_launch.listening import shown_host

    host, names = shown_host(router.host), router.served_model_names
    url = f"http://{host}:{router.http_port}"
    body = json.dumps({"model": names[0], "prompt": "def fibonacci(n):", "max_tokens": 64})
    return "\n".join(
        (
            "",
            f"  Baton serves {', '.join(names)}. Ctrl-C stops it.",
            "",
            f"  HTTP   {url}/v1  (OpenAI's API)",
            f"  gRPC   {host}:{router.grpc_port}",
            f"  Docs   {url}/docs",
            f"  Chat   baton chat --url {url}",
            "",
            f"curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "",
        )
    )
