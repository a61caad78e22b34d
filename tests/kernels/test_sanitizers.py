"""No C kernel reads or writes out of bounds, nor does what C leaves undefined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton_kernels.cpu.build import Level, build
from tests.kernels.levels import BEST, EMULATED_AMX, PAIRS

# Compiling one takes half a minute. Where the CPU has tiles, what emulates them is the same code but for
# those, whose loads no sanitizer sees.
LEVELS = [level for level in (BEST, PAIRS, EMULATED_AMX) if "amx_tile" not in level.needs]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("level", "count"),
    [(level, 6 if level is EMULATED_AMX else 12) for level in LEVELS],  # emulated tiles take long
    ids=lambda value: getattr(value, "name", None),
)
def test_nothing_is_read_or_written_out_of_bounds(
    level: Level, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random cases in a process of its own, compiled with address and undefined-behaviour sanitizers."""
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sanitizers = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build(Level(f"sanitized-{level.name}", level.needs, (*level.flags, *sanitizers)))
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.run_cases", str(library), str(count)],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == str(count)
