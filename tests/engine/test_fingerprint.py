"""What tells models apart, by the bytes of their weights."""

import os
import shutil
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import save_file

from baton import fingerprint
from baton.core.errors import StartupError
from baton.fingerprint import CONFIG_DIGEST_BYTES, FINGERPRINT_BYTES, config_digest, model_fingerprint


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, directory / "model.safetensors")
    return directory


def flip(file: Path, offset: int) -> None:
    """One bit, as another fine-tuning would."""
    with file.open("r+b") as stream:
        stream.seek(offset, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(offset, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def test_equal_where_the_model_is(model_dir: Path, tmp_path: Path) -> None:
    original = model_fingerprint(model_dir)
    assert len(original) == FINGERPRINT_BYTES
    assert original[:CONFIG_DIGEST_BYTES] == config_digest(model_dir)
    elsewhere = shutil.copytree(model_dir, tmp_path / "elsewhere")
    (elsewhere / "README.md").write_text("not part of the model")
    assert model_fingerprint(elsewhere) == original
    (elsewhere / "config.json").write_text("{ }")
    assert model_fingerprint(elsewhere)[:CONFIG_DIGEST_BYTES] != original[:CONFIG_DIGEST_BYTES]


@pytest.mark.parametrize("offset", [-1, -4000, -8000])
def test_one_bit_of_the_weights(model_dir: Path, offset: int) -> None:
    before = model_fingerprint(model_dir)
    file = model_dir / "model.safetensors"
    flip(file, offset)
    os.utime(file, ns=(1, 1))  # however coarse the file system's clock
    after = model_fingerprint(model_dir)
    assert after[:CONFIG_DIGEST_BYTES] == before[:CONFIG_DIGEST_BYTES]
    assert after != before


def test_many_chunks(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(fingerprint, "_READ_BYTES", 1 << 9)
    found = set()
    for number, offset in enumerate((-1, -700, -3000, -8001), start=1):
        found.add(model_fingerprint(model_dir))
        flip(model_dir / "model.safetensors", offset)
        os.utime(model_dir / "model.safetensors", ns=(number, number))
    assert len({*found, model_fingerprint(model_dir)}) == 5


def test_read_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_fingerprint(model_dir)
    monkeypatch.setattr(fingerprint, "_tree_digest", lambda *_: pytest.fail("read again"))
    assert model_fingerprint(model_dir) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digest": 5}', '{"digest": "00"}'])
def test_a_cache_that_others_have_written_into(model_dir: Path, tmp_path: Path, content: str) -> None:
    before = model_fingerprint(model_dir)
    [entry] = (tmp_path / "cache" / "baton" / "fingerprints").iterdir()
    entry.write_text(content)
    assert model_fingerprint(model_dir) == before


def test_a_cache_that_cannot_be_written(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert model_fingerprint(model_dir) == model_fingerprint(model_dir)


def test_nobody_waits_when_loading_fails(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, seen = Event(), []

    def chunk(descriptor: int, stop: Event, start: int) -> bytes:
        started.set()
        seen.append(stop.wait(60))
        return b""

    monkeypatch.setattr(fingerprint, "_chunk_digest", chunk)
    with pytest.raises(KeyboardInterrupt):
        interrupt_loading(model_dir, started)
    assert seen == [True]


def test_a_truncated_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(StartupError, match=r"model\.safetensors"):
        model_fingerprint(model_dir)


def test_what_is_no_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model-1.safetensors").mkdir()
    with pytest.raises(StartupError, match=r"model-1\.safetensors' can't be read: Is a directory"):
        model_fingerprint(model_dir)


def interrupt_loading(model_dir: Path, started: Event) -> None:
    with fingerprint.fingerprint_beside(model_dir):
        assert started.wait(60)
        raise KeyboardInterrupt
