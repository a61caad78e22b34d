"""`baton doctor`: whether this machine is fit to serve, line by line, and what to do where it is not."""

import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from baton.config import RouterConfig, available_cores
from baton.core.errors import StartupError
from baton.model_files import read_config, require_complete, safetensors_files
from baton_launch.health import reason_not_serving
from baton_launch.listening import require_free_port
from baton_launch.model_source import find_model

_TIMEOUT_S = 400.0  # the C kernels may have to be built
_FEW_FILES = 4096  # open files that a busy router may come to
_OPTIONAL = {
    "xgrammar": "for --structured-outputs-backend xgrammar: pip install baton-serve[structured-outputs]",
    "nixl_cu13": "for KV pages by NIXL: pip install baton-serve[nixl]",
}


class Verdict(Enum):
    """Of one check."""

    FINE = "ok"
    NOTE = "note"  # it works; something could be better
    BAD = "bad"  # Baton does not start, or does not serve


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found."""

    verdict: Verdict
    what: str
    advice: str = ""


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model to look at too.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", metavar="ADDRESS", help="A server to ask; may be repeated.")
    ] = None,
) -> None:
    """Check this machine, and say what to do: installation, device, compiler, memory, ports, a model, peers.

    The exit status is 1 where something is bad.
    """
    is_bad = False
    for finding in findings(model, peer or ()):
        advice = f": {finding.advice}" if finding.advice else ""
        typer.echo(f"{finding.verdict.value:>4}  {finding.what}{advice}")
        is_bad |= finding.verdict is Verdict.BAD
    if is_bad:
        raise typer.Exit(1)


def findings(model: str | None, peers: Sequence[str]) -> Iterator[Finding]:
    """Every check's, one after the other."""
    from baton import __version__

    system = f"{platform.system()} {platform.machine()}"
    yield Finding(Verdict.FINE, f"Baton {__version__}, Python {platform.python_version()}, {system}")
    yield from _of_computing()
    yield from _of_limits()
    yield from _of_ports()
    yield from _of_packages()
    yield _of_model(model)
    for address in peers:
        yield _of_peer(address)


def _of_computing() -> Iterator[Finding]:
    """Of torch, which this process does not import."""
    program = [sys.executable, "-P", "-m", "baton.engine.this_machine"]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        yield Finding(Verdict.BAD, f"torch can't be used: {lines[-1]}", "install Baton anew: pip install .")
        return
    yield Finding(Verdict.FINE, f"PyTorch {found['torch']}")
    if found["why_no_gpu"] is None:
        yield Finding(Verdict.FINE, f"device: {found['device']}")
        return
    yield Finding(Verdict.FINE, f"device: the CPU, with {available_cores()} cores ({found['why_no_gpu']})")
    if found["has_kernels"]:
        yield Finding(Verdict.FINE, f"C kernels for {found['best_level']} CPUs")
    else:
        yield Finding(Verdict.NOTE, "steps are several times slower", found["why_no_kernels"])
    if not found["multiplies_bfloat16"]:
        what = "this CPU has no bfloat16 instructions, which prompts are computed several times faster with"
        yield Finding(Verdict.NOTE, what, "--quantization int8 helps")


def _of_limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEW_FILES:
        advice = f"ulimit -n {min(hard, 65536)}" if hard >= _FEW_FILES else "raise the limit for this user"
        what = f"{soft} open files are allowed, each connection takes one"
        yield Finding(Verdict.NOTE, what, advice)
    else:
        yield Finding(Verdict.FINE, f"{soft} open files")
    memory = _memory_bytes()
    if memory is not None:
        what = f"{memory / 2**30:.1f} GiB of memory are free; a worker's KV cache takes 1 of them"
        yield Finding(Verdict.FINE, what)


def _memory_bytes() -> int | None:
    """What is free; None where the system does not say it so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    [kibibytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")] or ["0"]
    return int(kibibytes) * 1024


def _of_ports() -> Iterator[Finding]:
    host = RouterConfig.host
    for port, option in ((RouterConfig.http_port, "--port"), (RouterConfig.grpc_port, "--grpc-port")):
        try:
            require_free_port(host, port, option)
        except StartupError as error:
            yield Finding(Verdict.NOTE, str(error))
        else:
            yield Finding(Verdict.FINE, f"port {port} is free")
    if not os.environ.get("BATON_CLUSTER_TOKEN"):
        what = "BATON_CLUSTER_TOKEN is not set, which workers that others reach need"
        yield Finding(Verdict.NOTE, what, "baton serve makes its own; else set one, the same everywhere")


def _of_packages() -> Iterator[Finding]:
    for name, advice in _OPTIONAL.items():
        is_there = importlib.util.find_spec(name) is not None
        what = f"{name} is installed" if is_there else f"{name} is not installed"
        yield Finding(Verdict.FINE, what, "" if is_there else f"needed only {advice}")


def _of_model(model: str | None) -> Finding:
    try:
        source = find_model(model)
        read_config(source.directory)
        files = safetensors_files(source.directory)
        for file in files:
            require_complete(file)
    except StartupError as error:
        return Finding(Verdict.BAD, str(error))
    size = sum(file.stat().st_size for file in files)
    what = f"model {source.name}: {size / 2**20:.0f} MiB of weights at {source.directory}"
    return Finding(Verdict.FINE, what)


def _of_peer(address: str) -> Finding:
    try:
        reason = reason_not_serving(address)
    except StartupError as error:
        return Finding(Verdict.BAD, str(error))
    if reason is None:
        return Finding(Verdict.FINE, f"{address} serves")
    return Finding(Verdict.BAD, f"{address} does not serve: {reason}", "start it, or see its log")
