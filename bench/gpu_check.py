"""All that a GPU can tell, in one command and within nine minutes: `python -m bench.gpu_check --out DIR`.

Needs no network, and no package beyond torch, triton, transformers, safetensors, tokenizers, grpcio, protobuf
and pytest: what else Baton's servers import has stand-ins (`bench/stand_ins`), used where it is missing. Each
part runs in a process of its own under its own limit and writes each figure as it has it (`DIR/PART.jsonl`,
its output in `DIR/PART.log`), so that a part that fails or hangs costs what it has not measured yet and no
more. Last come a table, and all of it in `DIR/gpu_check.json`.

Exit code 0: all parts ended; 1: some did not, or some test failed; 2: there is no CUDA device.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TOTAL_S = 535.0
_INTERRUPTED_S = 5.0  # for a part whose time is up, to print what it knows
_MET: dict[bool | None, str] = {True: "yes", False: "NO", None: ""}
PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "flash-attn", "numpy")
ROOT = Path(__file__).parent.parent
STAND_INS = Path(__file__).parent / "stand_ins"  # a folder for each package, of its name


@dataclass(frozen=True)
class Part:
    """What is run, and how long it may take at most."""

    name: str
    limit_s: float
    command: tuple[str, ...]


def parts(out: Path) -> tuple[Part, ...]:
    """In the order of what is missed most if time runs out."""

    def figures(name: str, limit_s: float) -> Part:
        return Part(name, limit_s, (sys.executable, "-m", "bench.gpu_parts", name, str(out)))

    tests = (sys.executable, "-m", "bench.gpu_tests")
    return (
        figures("limits", 45),
        figures("parity", 45),
        figures("attention", 40),
        figures("model", 80),
        Part("tests", 80, (*tests, "tests/kernels/gpu", "tests/engine/gpu")),
        figures("transfers", 90),
        Part("transfer-tests", 75, (*tests, "tests/kv_transfer/gpu")),
        figures("float8", 30),
        figures("other-kernels", 15),
        figures("transformers", 35),
    )


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and the figures that it had by then."""

    name: str
    status: str  # "done", "failed (code)", "stopped after N s" or "no time left"
    seconds: float
    figures: list[dict[str, Any]]
    last_lines: list[str]


def environment(packages: Iterable[str]) -> dict[str, str]:
    """This process's, in which those packages are found, by their stand-ins."""
    path = (os.environ.get("PYTHONPATH"), *(str(STAND_INS / package) for package in packages))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def missing_packages() -> list[str]:
    """Those of which there is a stand-in and nothing else."""
    return [folder.name for folder in sorted(STAND_INS.iterdir()) if find_spec(folder.name) is None]


def run_part(part: Part, out: Path, left_s: float) -> Outcome:
    """Run it until its limit or the check's, whichever comes first; never raises for what it does."""
    limit_s = min(part.limit_s, left_s)
    if limit_s <= 0:
        return Outcome(part.name, "no time left", 0.0, [], [])
    started = time.monotonic()
    (out / f"{part.name}.jsonl").unlink(missing_ok=True)  # an earlier check's
    with (out / f"{part.name}.log").open("wb") as log:
        # A session of its own, so that stopping it stops what it has started.
        process = subprocess.Popen(
            part.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=environment(missing_packages()),
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            status = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            _stop(process)
            status = f"stopped after {limit_s:.0f} s"
    seconds = round(time.monotonic() - started, 1)
    lines = (out / f"{part.name}.log").read_text(errors="replace").splitlines()
    return Outcome(part.name, status, seconds, _figures(out / f"{part.name}.jsonl"), lines[-5:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, as pytest then says what has failed, and kill it and what it has started."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_INTERRUPTED_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(path: Path) -> list[dict[str, Any]]:
    """The whole lines; the last one may have been cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a figure, and one for each part that did not end well."""
    lines = [("part", "figure", "value", "unit", "bar", "met")]
    for outcome in outcomes:
        for figure in outcome.figures:
            value = figure["value"]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            bar, met = figure.get("bar") or "", _MET[figure.get("met")]
            lines.append((outcome.name, figure["name"], text, figure["unit"], bar, met))
        if outcome.status != "done" or not outcome.figures:
            lines.append((outcome.name, outcome.status, f"{outcome.seconds:.1f}", "s", "", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all parts are done."""
    return int(any(outcome.status != "done" for outcome in outcomes))


def driver_version() -> str:
    """As nvidia-smi says it, which not every container has."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError):
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        return asked.stdout.strip() or "unknown"
    return "unknown"


@cache
def machine() -> dict[str, str]:
    """Device, driver and versions, so that figures can be told apart later."""
    import torch

    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # which also says what it was built for
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        found["device"] += f"{properties.total_memory >> 20} MiB"
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = driver_version()
    else:
        found["device"] = "no CUDA device"
    return found


def check(out: Path, chosen: Sequence[Part], total_s: float) -> list[Outcome]:
    """Run the parts one after the other; what is known so far is on disk after each."""
    # Parts that are stopped are to hear of it, also where this is a script's background job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + total_s
    for part in chosen:
        print(f"{part.name} ...", flush=True)
        outcome = run_part(part, out, deadline - time.monotonic())
        outcomes.append(outcome)
        print(f"  {outcome.status}, {outcome.seconds} s", flush=True)
        if outcome.status != "done":
            print("".join(f"  | {line}\n" for line in outcome.last_lines), end="", flush=True)
        write(out, outcomes)
    return outcomes


def write(out: Path, outcomes: Sequence[Outcome]) -> None:
    """All that is known, as JSON."""
    document = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "parts": [vars(outcome) for outcome in outcomes],
    }
    (out / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Checks Baton on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and logs")
    out = parser.parse_args(arguments).out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    import torch

    chosen = parts(out)
    if not torch.cuda.is_available():
        write(out, [Outcome(part.name, "no CUDA device", 0.0, [], []) for part in chosen])
        names = ", ".join(part.name for part in chosen)
        print(
            f"no CUDA device: none of {names} was run and nothing was measured; run this on a machine with a "
            f"GPU and a torch that sees it (this one is {torch.__version__})",
            file=sys.stderr,
        )
        return 2
    machine()  # before anything goes wrong
    outcomes = check(out, chosen, TOTAL_S)
    print(table(outcomes))
    print(f"{machine()['device']}; all figures: {out / 'gpu_check.json'}")
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
