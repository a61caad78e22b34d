"""Options that people know from vLLM: each is understood, or answered with one line that says what to do."""

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

from baton.core.errors import StartupError
from baton_launch.options import Command

ANY_VALUE: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class ForeignOption:
    """One that Baton has not."""

    flags: tuple[str, ...]
    advice: str  # what holds here, or what to do instead
    is_flag: bool = False
    fits: Collection[str] | None = None  # values that ask for what Baton does anyway; None: there are none

    def answer(self, value: Any) -> None:
        """Say so where it asks for what Baton does anyway; else raises StartupError."""
        asked = self.flags[0] if self.is_flag else f"{self.flags[0]} {value}"
        if self.fits is None or (self.fits and value not in self.fits):
            raise StartupError(f"{asked}: {self.advice}")
        print(f"baton: {asked} is not needed: {self.advice}", file=sys.stderr)


def _needless(flag: str, *others: str, advice: str) -> ForeignOption:
    return ForeignOption((flag, *others), advice, is_flag=True, fits=ANY_VALUE)


def _refused(flag: str, *others: str, advice: str) -> ForeignOption:
    return ForeignOption((flag, *others), advice, is_flag=True)


def _valued(flag: str, *others: str, advice: str, fits: Collection[str] | None = None) -> ForeignOption:
    return ForeignOption((flag, *others), advice, fits=fits)


_ONE_DEVICE = (
    "each worker computes on one device; for more of them start more workers, with --prefill N and --decode N"
)
_PROXY = "Baton does not do this: put a proxy such as nginx in front of it"
_IN_THE_FILE = "what config.json says holds: edit the file instead"
_QUIET = "requests are logged at --log-level debug alone"

FOREIGN_OPTIONS = (
    _valued("--model", advice="write the model without the option: baton serve MODEL"),
    _valued("--tensor-parallel-size", "-tp", advice=_ONE_DEVICE, fits=("1",)),
    _valued("--pipeline-parallel-size", "-pp", advice=_ONE_DEVICE, fits=("1",)),
    _valued(
        "--data-parallel-size",
        "-dp",
        advice="start that many workers with --role both --workers N, or with --prefill N and --decode N",
        fits=("1",),
    ),
    _valued("--distributed-executor-backend", advice=_ONE_DEVICE, fits=ANY_VALUE),
    _needless("--enable-prefix-caching", advice="prefix caching is always on"),
    _refused(
        "--no-enable-prefix-caching",
        advice="prefix caching is always on: requests with another cache_salt share nothing",
    ),
    _needless("--enable-chunked-prefill", advice="prefill is always chunked, by --max-num-batched-tokens"),
    _refused(
        "--no-enable-chunked-prefill",
        advice="prefill is always chunked: --max-num-batched-tokens says how many tokens are a chunk",
    ),
    _needless("--async-scheduling", advice="steps are always planned ahead on GPUs"),
    _valued("--api-key", advice="Baton checks no keys: put a proxy that does in front of it"),
    _valued("--seed", advice="a request's own `seed` makes its answer repeatable: send it there"),
    _needless("--trust-remote-code", advice="Baton runs no code of a checkpoint"),
    _valued("--tokenizer", advice="the tokenizer is read from the model's directory: put its files there"),
    _valued("--tokenizer-mode", advice="tokenizer.json is read as it is", fits=("auto",)),
    _valued(
        "--revision",
        advice="download it with `hf download MODEL --revision REVISION --local-dir DIR`, and serve DIR",
    ),
    _valued("--tokenizer-revision", advice="the tokenizer is read from the model's directory"),
    _valued("--download-dir", advice="set the environment's HF_HUB_CACHE to that directory"),
    _valued("--load-format", advice="weights are read from safetensors", fits=("auto", "safetensors")),
    _valued("-q", advice="write --quantization"),
    _valued("--kv-cache-memory-bytes", advice="write --kv-cache-memory, such as 4GiB"),
    _valued("--num-gpu-blocks-override", advice="--kv-cache-memory says how much there is, such as 4GiB"),
    _valued("--swap-space", advice="what is preempted is computed again", fits=ANY_VALUE),
    _valued("--cpu-offload-gb", advice="weights stay on the device: use --quantization", fits=("0",)),
    _needless("--disable-log-requests", "--no-enable-log-requests", advice=_QUIET),
    _needless("--disable-log-stats", advice="figures are at /metrics, and not in the log"),
    _needless("--disable-uvicorn-access-log", "--disable-access-log", advice=_QUIET),
    _refused("--enable-log-requests", advice="write --log-level debug"),
    _valued("--uvicorn-log-level", advice="write --log-level"),
    _valued(
        "--chat-template",
        advice="put the template into the model's directory as chat_template.jinja",
    ),
    _valued("--chat-template-content-format", advice="it is read from the chat template", fits=("auto",)),
    _valued("--ssl-keyfile", advice=_PROXY),
    _valued("--ssl-certfile", advice=_PROXY),
    _valued("--ssl-ca-certs", advice=_PROXY),
    _refused("--enable-lora", advice="Baton applies no adapters: merge them into the model, and serve that"),
    _valued("--lora-modules", advice="Baton applies no adapters: merge them into the model, and serve that"),
    _valued("--speculative-config", advice="Baton has no speculative decoding: leave it out"),
    _needless("--enable-auto-tool-choice", advice="tools are called where the chat template has them"),
    _needless("--enable-reasoning", advice="thinking is told apart where the chat template has it"),
    _valued("--hf-overrides", advice=_IN_THE_FILE),
    _valued("--rope-scaling", advice=_IN_THE_FILE),
    _valued("--limit-mm-per-prompt", advice="Baton serves models of text alone: leave it out"),
    _valued("--runner", "--task", advice="Baton generates text", fits=("auto", "generate")),
)


def answers_foreign_options(*own_flags: str) -> Callable[[Command], Command]:
    """Let a command answer options that it has not: all but `own_flags`. They stand in no --help."""

    def decorate(command: Command) -> Command:
        rows = [row for row in FOREIGN_OPTIONS if not set(row.flags).intersection(own_flags)]
        names = {f"foreign_{index}": row for index, row in enumerate(rows)}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(**{name: value for name, value in given.items() if name not in names})

        signature = inspect.signature(command)
        foreign = [_parameter(name, row) for name, row in names.items()]
        parameters = [*signature.parameters.values(), *foreign]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, row: ForeignOption) -> inspect.Parameter:
    """Hidden, and answered before anything else is looked at."""

    def answer(value: Any) -> None:
        if value not in (None, False):
            row.answer(value)

    info = typer.Option(None, *row.flags, hidden=True, is_eager=True, callback=answer)
    annotation = bool | None if row.is_flag else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


class ForgivingCommand(TyperCommand):
    """One that takes several names after one --served-model-name, as vLLM does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See TyperCommand."""
        has_argument = any(param.param_type_name == "argument" for param in self.params)
        if not has_argument or (args and not args[0].startswith("-")):  # else one of them may be MODEL
            args = _each_with_flag(args, "--served-model-name")
        return super().parse_args(ctx, args)


def with_dashes(name: str) -> str:
    """--max_model_len is --max-model-len."""
    return name.replace("_", "-")


def _each_with_flag(arguments: Sequence[str], flag: str) -> list[str]:
    """`FLAG a b` as `FLAG a FLAG b`."""
    result: list[str] = []
    last, num_values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            last, num_values = with_dashes(argument), 0
        else:
            num_values += 1
            if last == flag and num_values > 1:
                result.append(flag)
        result.append(argument)
    return result
