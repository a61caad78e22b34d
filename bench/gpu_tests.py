"""Tests on a GPU, a process for each file, for `bench.gpu_check`: `python -m bench.gpu_tests PATH...`.

Most of their time Triton compiles kernels, on one core in each process.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NUM_PROCESSES = 8
_PYTEST = (
    sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--maxfail=20", "--durations=5",
)  # fmt: skip
_DONE = (0, 5)  # all passed, or all were skipped before there was a test


def run(paths: Sequence[str]) -> int:
    """0 if all tests pass. What a file's tests say is printed when they end, also when SIGINT ends them."""
    found = (Path(path) for path in paths)
    files = [file for path in found for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    pool = ThreadPoolExecutor(NUM_PROCESSES)
    try:
        codes = list(pool.map(_run, files))
    except KeyboardInterrupt:  # which their processes have got too
        pool.shutdown(cancel_futures=True)
        return 2
    failed = [str(file) for file, code in zip(files, codes, strict=True) if code not in _DONE]
    print(f"{len(files)} files, failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def _run(file: Path) -> int:
    ended = subprocess.run(
        (*_PYTEST, str(file)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(ended.stdout, flush=True)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
