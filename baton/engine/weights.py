"""Loads safetensors checkpoints tensor by tensor into preallocated parameters: one copy in memory."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.core.errors import StartupError
from baton.core.kv_layout import MODEL_DTYPES
from baton.engine.quantization.checkpoint_scales import dequantized, scales_of_outputs, weight_scales
from baton.engine.tensor_files import opened, tensor_names
from baton.model_files import safetensors_files

_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # old files store RoPE's frequencies
# Files of models with tied embeddings may store the output projection a second time, or alone.
_EMBEDDING, _PROJECTION = "model.embed_tokens.weight", "lm_head.weight"
# Read apart from the weights, or of no use: states have no scale that is known before.
_SCALE_SUFFIXES = (".weight_scale", ".input_scale", ".output_scale", ".k_scale", ".v_scale")
_NAMES_SHOWN = 3

_logger = logging.getLogger(__name__)


def resolve_dtype(name: str, config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of EngineConfig.dtype: for "auto" the one that `config.json` names, else float32.

    Raises StartupError where that one can't be computed with.
    """
    wanted = name
    if name == "auto":
        wanted = config.get("dtype") or config.get("torch_dtype") or "float32"
    if wanted not in MODEL_DTYPES:
        raise StartupError(
            f"config.json's dtype '{wanted}' is not supported; choose bf16, fp16 or fp32 with --dtype."
        )
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def load_weights(model_dir: Path, parameters: Mapping[str, Tensor]) -> None:
    """Fill every tensor of `parameters` from the checkpoint's tensor of that name, converting its dtype.

    Parameters in float8 are of matrices that the checkpoint has in it: they get its bits, and those of the
    scales' names a scale for each output. Any other parameter gets the product of both.
    Raises StartupError where files or tensors are missing, corrupt, of another shape, or of no use
    to the model (its config.json would then not describe it).
    """
    started = time.monotonic()
    files = safetensors_files(model_dir)
    missing = set(parameters)
    stored = tensor_names(files)
    _require_projection(model_dir, stored, parameters)
    scales, float8 = weight_scales(files), Counter[torch.dtype]()
    second_copy: Tensor | None = None
    for name, tensor in _with_progress(_tensors(files), len(parameters)):
        if name.endswith(_SCALE_SUFFIXES):
            continue
        if name == _PROJECTION and _EMBEDDING not in stored and name not in parameters:
            name = _EMBEDDING
        if name not in parameters:
            if name == _PROJECTION:
                second_copy = tensor
                continue
            if name.endswith(_IGNORED_SUFFIX):
                continue
            raise StartupError(
                f"'{model_dir}' has a tensor '{name}' that its config.json leaves no place for; "
                "check that config.json and weights belong together."
            )
        if tensor.dtype == torch.float8_e4m3fn:
            float8[parameters[name].dtype] += 1
            _copy_float8(name, tensor, scales.get(name), parameters)
            missing.discard(f"{name}_scale")
        else:
            _copy(name, tensor, parameters[name])
        missing.discard(name)
    if missing:
        names = ", ".join(sorted(missing)[:_NAMES_SHOWN])
        raise StartupError(
            f"'{model_dir}' lacks {len(missing)} of {len(parameters)} tensors ({names}"
            f"{', ...' if len(missing) > _NAMES_SHOWN else ''}); check that the download is complete."
        )
    if second_copy is not None:
        _require_equal(model_dir, second_copy, parameters[_EMBEDDING])
    for dtype, number in float8.items():
        fate = "are multiplied as they are"
        if dtype != torch.float8_e4m3fn:
            fate = f"are converted to {str(dtype).removeprefix('torch.')} as they are loaded"
        _logger.info("%d matrices of the checkpoint that are in FP8 %s", number, fate)
    _logger.info(
        "loaded %d tensors from %d files in %.1f s", len(parameters), len(files), time.monotonic() - started
    )


def _require_projection(model_dir: Path, stored: Set[str], parameters: Mapping[str, Tensor]) -> None:
    """Raises StartupError where a model that has all else can't generate."""
    if set(parameters) - stored == {_PROJECTION}:
        raise StartupError(
            f"'{model_dir}' is a base model, which generates no text: it has no {_PROJECTION}, and its "
            "config.json does not say tie_word_embeddings; serve the model that was trained to generate."
        )


def _copy(name: str, source: Tensor, destination: Tensor) -> None:
    if source.shape != destination.shape:
        raise StartupError(
            f"The checkpoint's tensor '{name}' has shape {list(source.shape)}, but config.json asks for "
            f"{list(destination.shape)}; check that config.json and weights belong together."
        )
    destination.copy_(source)


def _require_equal(model_dir: Path, projection: Tensor, embedding: Tensor) -> None:
    """Raises StartupError where tied embeddings are not what the checkpoint would project with."""
    if projection.shape != embedding.shape or not torch.equal(projection.to(embedding), embedding):
        raise StartupError(
            f"'{model_dir}' has a {_PROJECTION} that differs from its {_EMBEDDING}, but config.json says "
            "that they are one; set its tie_word_embeddings to false to use both."
        )


def _copy_float8(name: str, weight: Tensor, scale: Tensor | None, parameters: Mapping[str, Tensor]) -> None:
    if parameters[name].dtype != weight.dtype:
        _copy(name, dequantized(name, weight, scale), parameters[name])
        return
    _copy(name, weight, parameters[name])
    scale_name = f"{name}_scale"
    _copy(scale_name, scales_of_outputs(name, weight, scale), parameters[scale_name])


def _tensors(files: tuple[Path, ...]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of all files, one in memory at a time."""
    for file in files:
        with opened(file) as checkpoint:
            for name in checkpoint.names:
                yield name, checkpoint.tensor(name)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if a person is watching it; what it yields moves it on by one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def _with_progress(tensors: Iterator[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    with progress("Loading weights", total) as advance:
        for item in tensors:
            yield item
            advance()
