"""What vLLM's users type is understood, or answered with one line that says what to do."""

import sys
from pathlib import Path

import pytest
import typer

from baton_launch import main, serve
from baton_launch.foreign_options import FOREIGN_OPTIONS, ForeignOption
from baton_launch.serve import ServePlan

COMMANDS = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
KNOWN_FROM_VLLM = (
    *(
        "-tp",
        "-pp",
        "-dp",
        "-q",
        "--tensor-parallel-size",
        "--pipeline-parallel-size",
        "--data-parallel-size",
    ),
    *("--enable-prefix-caching", "--enable-chunked-prefill", "--api-key", "--seed", "--log-level", "--dtype"),
    *("--max-model-len", "--served-model-name", "--gpu-memory-utilization", "--max-num-seqs", "--model"),
    *(
        "--trust-remote-code",
        "--tokenizer",
        "--revision",
        "--download-dir",
        "--load-format",
        "--quantization",
    ),
    *("--kv-cache-dtype", "--swap-space", "--disable-log-requests", "--enforce-eager", "--chat-template"),
    *(
        "--uvicorn-log-level",
        "--ssl-keyfile",
        "--ssl-certfile",
        "--lora-modules",
        "--enable-lora",
    ),
    *("--speculative-config", "--enable-auto-tool-choice"),
    *("--max-num-batched-tokens", "--block-size", "--host", "--port"),
)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[ServePlan]:
    """What `baton serve` would have started."""
    plans: list[ServePlan] = []
    monkeypatch.setattr(serve, "run_plan", plans.append)
    monkeypatch.setattr("baton_launch.listening.require_free_port", lambda *_: None)
    return plans


def answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Exit status and the line on standard error."""
    monkeypatch.setattr(sys, "argv", ["baton", *arguments])
    with pytest.raises(SystemExit) as exit:
        main.main()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1, shown.err
    return int(exit.value.code or 0), shown.err.strip()


@pytest.mark.parametrize("command", ["serve", "router", "worker", "prefill", "decode"])
def test_each_is_known_to_each_command_that_serves(command: str) -> None:
    flags = {flag for parameter in COMMANDS[command].params for flag in parameter.opts}
    of_engines = {"--dtype", "--gpu-memory-utilization", "--max-num-seqs", "--quantization", "--block-size"}
    of_engines |= {"--kv-cache-dtype", "--enforce-eager", "--max-num-batched-tokens"}
    of_routers = {"--served-model-name", "--host", "--port"}
    left_out = {"serve": set(), "router": of_engines}.get(command, of_routers)
    assert set(KNOWN_FROM_VLLM) - flags == left_out


def test_no_help_tells_of_them() -> None:
    flags = {flag for row in FOREIGN_OPTIONS for flag in row.flags}
    for command in COMMANDS.values():
        shown = {flag for parameter in command.params if not parameter.hidden for flag in parameter.opts}
        assert shown & flags <= {"--model"}


@pytest.mark.parametrize("row", FOREIGN_OPTIONS, ids=lambda row: row.flags[0])
def test_what_baton_has_not_is_refused_and_the_rest_goes_on(
    row: ForeignOption,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plans: list[ServePlan],
    model_dir: Path,
) -> None:
    """By each of its spellings, before anything else is looked at."""
    for flag in row.flags:
        fitting = [] if row.is_flag else [next(iter(row.fits or ()), "x")]
        status, line = answer(monkeypatch, capsys, "serve", str(model_dir), flag, *fitting)
        asked = " ".join([row.flags[0], *fitting])
        if row.fits is None:
            assert (status, line, plans) == (2, f"baton: {asked}: {row.advice}", [])
        else:
            assert (status, line) == (0, f"baton: {asked} is not needed: {row.advice}")
            assert plans.pop().router.model_dir == model_dir
        if row.fits:
            status, line = answer(monkeypatch, capsys, "serve", str(model_dir), f"{flag}=other")
            assert (status, line) == (2, f"baton: {row.flags[0]} other: {row.advice}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-tp", "4"], "--tensor-parallel-size 4: each worker computes on one device"),
        (["--tensor_parallel_size=4"], "--tensor-parallel-size 4: "),
        (["--lora-modules", "a=b", "c=d"], "merge them into the model"),
        (["--max-model-len", "auto"], "'auto' is no number of tokens: write it like 8192"),
        (["--quantization", "awq"], "unknown quantization 'awq': use none, int8, fp8"),
    ],
)
def test_as_people_type_it(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plans: list[ServePlan],
    model_dir: Path,
) -> None:
    status, line = answer(monkeypatch, capsys, "serve", str(model_dir), *arguments)
    assert (status, plans) == (2, [])
    assert words in line


def test_underscores_are_dashes(
    monkeypatch: pytest.MonkeyPatch, plans: list[ServePlan], model_dir: Path
) -> None:
    command = ["baton", "serve", str(model_dir), "--max_model_len=4k", "--max-num_seqs", "3", "--dtype=half"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main.main()
    [engine] = {worker.engine for worker in plans[0].workers.values()}
    assert (engine.max_model_len, engine.max_num_seqs, engine.dtype) == (4000, 3, "float16")
