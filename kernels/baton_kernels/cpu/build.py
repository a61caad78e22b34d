"""Builds the C kernels with the system's compiler, once for each kind of CPU, into the user's cache.

    python -m baton_kernels.cpu.build

builds them for every kind into this package, for machines that are to have no compiler, such as containers.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
SHIPPED = SOURCES / "built"  # by `build_all`
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-D_GNU_SOURCE", "-pthread")
# Products and sums become one instruction, as -std=c11 alone would forbid; nothing else of -ffast-math.
_ARITHMETIC = ("-ffp-contract=fast", "-fno-math-errno")
_TIMEOUT_S = 300


class KernelsUnavailable(Exception):
    """There are no C kernels, for the reason that the message gives in one line."""


@dataclass(frozen=True, slots=True)
class Level:
    """A kind of CPU: what it must have, in the words of /proc/cpuinfo, and how to compile for it."""

    name: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VNNI = (*_AVX512, "avx512_vnni")
_BFLOAT16 = (*_VNNI, "avx512_bf16")
_AMX = (*_BFLOAT16, "amx_tile", "amx_bf16")


def _compiled_for(features: Iterable[str]) -> tuple[str, ...]:
    # The compilers write avx512vnni and amx-tile where /proc/cpuinfo has avx512_vnni and amx_tile.
    names = (feature.replace("amx_", "amx-").replace("_", "") for feature in features)
    return tuple(f"-m{name}" for name in names)


# The best first.
LEVELS = (
    Level("amx", _AMX, (*_compiled_for(_AMX), "-mprefer-vector-width=512")),
    Level("avx512-bf16", _BFLOAT16, (*_compiled_for(_BFLOAT16), "-mprefer-vector-width=512")),
    Level("avx512-vnni", _VNNI, (*_compiled_for(_VNNI), "-mprefer-vector-width=512")),
    Level("avx512", _AVX512, (*_compiled_for(_AVX512), "-mprefer-vector-width=512")),
    Level("avx2", _AVX2, _compiled_for(_AVX2)),
    Level("portable", (), ()),
)


def cpu_features() -> frozenset[str]:
    """What the CPU can do, in the words of /proc/cpuinfo; nothing where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = [line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")]
    return frozenset(flags[0].split()) if flags else frozenset()


def supported_levels() -> list[Level]:
    """The levels that this CPU can run, the best first."""
    features = cpu_features()
    return [level for level in LEVELS if features.issuperset(level.needs)]


def build(level: Level) -> Path:
    """The library for that level, compiled if neither this package nor the cache has one of these sources and
    flags.

    Safe in many processes at once: one builds, and the others wait for it. Raises KernelsUnavailable.
    """
    flags = (*_FLAGS, *_ARITHMETIC, *level.flags)
    if (shipped := _shipped(level, flags)).exists():
        return shipped
    compiler = _compiler()
    library = (
        cache_directory()
        / f"kernels-{level.name}-{_fingerprint((*compiler, *flags, _run((*compiler, '--version'))))}.so"
    )
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(library.with_suffix(".lock")):
            if not library.exists():
                _logger.info("building C kernels for %s CPUs, once, with %s", level.name, compiler[0])
                _compile((*compiler, *flags), library)
    except OSError as error:
        raise KernelsUnavailable(f"'{library.parent}' can't be written to ({error.strerror})") from error
    return library


def build_all() -> list[Path]:
    """The libraries for every level of this machine's architecture, in this package. Raises
    KernelsUnavailable."""
    compiler, built = _compiler(), []
    SHIPPED.mkdir(exist_ok=True)
    for level in LEVELS:
        if level.needs and platform.machine() not in ("x86_64", "AMD64"):
            continue
        flags = (*_FLAGS, *_ARITHMETIC, *level.flags)
        built.append(_shipped(level, flags))
        _compile((*compiler, *flags), built[-1])
    return built


def _shipped(level: Level, flags: tuple[str, ...]) -> Path:
    return SHIPPED / f"kernels-{level.name}-{_fingerprint(flags)}.so"


@contextmanager
def _only_builder(lock: Path) -> Iterator[None]:
    """Waits for another process that builds the same: at most for its compiler's time-out."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, however the process ends
        yield


def _compile(command: tuple[str, ...], library: Path) -> None:
    """All files at once, for they take seconds each; nobody sees a library that is half there."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as directory:

        def compile_one(source: Path) -> str:
            made = Path(directory) / f"{source.stem}.o"
            _run((*command, "-c", str(source), "-o", str(made)))
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_one, sources("*.c")))
        built = Path(directory) / library.name
        _run((*command, "-shared", *objects, "-lm", "-o", str(built)))
        built.replace(library)


def sources(pattern: str) -> list[Path]:
    """The C files of that pattern, in order."""
    return sorted(SOURCES.glob(pattern))


def cache_directory() -> Path:
    """Where built libraries are kept: `baton/kernels` in XDG_CACHE_HOME or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "baton" / "kernels"


def _compiler() -> tuple[str, ...]:
    """The command in CC, else `cc`."""
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        raise KernelsUnavailable(
            f"there is no C compiler '{command[0]}': install one (Debian: apt install build-essential; "
            "Fedora: dnf install gcc; macOS: xcode-select --install), or name it with CC"
        )
    return tuple(command)


def _fingerprint(made_with: tuple[str, ...]) -> str:
    """Names a build by all that it is made from: how, and the sources."""
    digest = hashlib.blake2b(digest_size=10)
    for text in (*made_with, platform.machine()):
        digest.update(text.encode() + b"\0")
    for file in sources("*.[ch]"):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _run(command: tuple[str, ...]) -> str:
    """What the command prints. Raises KernelsUnavailable with the first line that speaks of an error."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"'{command[0]}' can't be run ({error})") from error
    if result.returncode == 0:
        return result.stdout
    lines = result.stderr.splitlines() or [f"exit status {result.returncode}"]
    reason = next((line for line in lines if "error" in line.lower()), lines[0])
    raise KernelsUnavailable(f"'{command[0]}' failed: {reason.strip()}")


if __name__ == "__main__":
    for made in build_all():
        print(made)
