"""Figures of a benchmark, as a table and as dated JSON."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from baton_kernels.cpu.build import cpu_features

RESULTS = Path(__file__).parent / "results"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {
        "p50": round(statistics.median(values), 3),
        "p90": round(percentile(values, 0.9), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One row a measurement."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def save(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows with date and machine to bench/results/."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    document = {"date": now.isoformat(timespec="seconds"), "machine": machine(), "rows": list(rows)}
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


# What tells apart the CPUs that kernels are written for, in the words of /proc/cpuinfo.
_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")


def machine() -> str:
    """Processor, cores, and what it multiplies with."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    features = [feature for feature in _FEATURES if feature in cpu_features()]
    return ", ".join((model, f"{os.cpu_count()} cores", " ".join(features) or "no vectors known"))
