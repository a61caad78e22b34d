"""What tells models apart: 32 bytes of the files that a model's KV pages depend on.

Two fine-tunes of one model differ in the bytes of their weights alone, and pages must not pass between them.
So all weights are read: in chunks, on several threads, while the model loads. What has been read once is kept
in the user's cache, by path, size and time of change.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event

from baton.config import available_cores
from baton.core.errors import StartupError
from baton.model_files import read_config, require_complete, safetensors_files

CONFIG_DIGEST_BYTES = 16
FINGERPRINT_BYTES = 32
_CHUNK_BYTES = 32 << 20
_READ_BYTES = 1 << 20
# More threads than that read faster than disks do.
_MAX_THREADS = 8

_logger = logging.getLogger(__name__)


def config_digest(model_dir: Path) -> bytes:
    """16 bytes of the model's config.json: equal for all weights of one shape. Raises StartupError."""
    read_config(model_dir)
    content = (model_dir / "config.json").read_bytes()
    return hashlib.blake2b(content, digest_size=CONFIG_DIGEST_BYTES).digest()


@contextmanager
def fingerprint_beside(model_dir: Path) -> Iterator[Callable[[], bytes]]:
    """Compute `model_fingerprint` beside what is done within; what it yields waits for it.

    If what is done within raises, nobody waits.
    """
    stop = Event()
    with ThreadPoolExecutor(1, "fingerprint") as thread:
        fingerprint = thread.submit(model_fingerprint, model_dir, stop)
        try:
            yield fingerprint.result
        except BaseException:
            stop.set()
            raise


def model_fingerprint(model_dir: Path, stop: Event | None = None) -> bytes:
    """32 bytes that are equal on every machine that has the same model files, and only there.

    The `config_digest`, and 16 bytes of BLAKE2b over the names and contents' digests of the files of weights.
    Raises StartupError where a file is missing, can't be read or is cut off, and CancelledError soon after
    `stop` is set.
    """
    stop = stop or Event()
    of_config = config_digest(model_dir)
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES - CONFIG_DIGEST_BYTES)
    for file in safetensors_files(model_dir):
        require_complete(file)
        name = file.name.encode()
        digest.update(len(name).to_bytes(8, "little"))  # so that bytes can't move from one field to the next
        digest.update(name)
        digest.update(_content_digest(file, stop))
    return of_config + digest.digest()


def _content_digest(file: Path, stop: Event) -> bytes:
    """As the cache has it, else computed and put there."""
    try:
        status = file.stat()
        path = str(file.resolve())
        is_of: dict[str, object] = {"path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        entry = _cache_entry(path)
        digest = _cached(entry, is_of)
        if digest is None:
            digest = _tree_digest(file, status.st_size, stop)
            _keep(entry, {**is_of, "digest": digest.hex()})
        return digest
    except OSError as error:
        raise StartupError(f"'{file}' can't be read: {error.strerror}") from error


def _tree_digest(file: Path, size: int, stop: Event) -> bytes:
    """SHA-256, which processors have instructions for, over the SHA-256 of each chunk."""
    with (
        file.open("rb", buffering=0) as stream,
        ThreadPoolExecutor(min(_MAX_THREADS, available_cores()), "fingerprint") as threads,
    ):
        chunks = threads.map(partial(_chunk_digest, stream.fileno(), stop), range(0, size, _CHUNK_BYTES))
        return hashlib.sha256(b"".join(chunks)).digest()


def _chunk_digest(descriptor: int, stop: Event, start: int) -> bytes:
    digest = hashlib.sha256()
    for offset in range(start, start + _CHUNK_BYTES, _READ_BYTES):
        if stop.is_set():
            raise CancelledError
        digest.update(os.pread(descriptor, _READ_BYTES, offset))
    return digest.digest()


def _cache_entry(path: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(base) if base else Path.home() / ".cache") / "baton" / "fingerprints"
    return directory / f"{hashlib.sha256(path.encode()).hexdigest()}.json"


def _cached(entry: Path, is_of: dict[str, object]) -> bytes | None:
    """None: there is none, or it is of a file that was there before, or no entry at all."""
    try:
        found = json.loads(entry.read_bytes())
        digest = bytes.fromhex(found.pop("digest"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest if found == is_of and len(digest) == hashlib.sha256().digest_size else None


def _keep(entry: Path, content: dict[str, object]) -> None:
    """At once or not at all: others may read and write the same entry now."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
            json.dump(content, file)
        Path(file.name).replace(entry)
    except OSError as error:
        _logger.info("the weights are read again at the next start: %s can't be written (%s)", entry, error)
