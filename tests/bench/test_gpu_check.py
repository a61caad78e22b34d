"""The logic of `bench.gpu_check`, with parts of the tests' own; nothing here needs a GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.core.kv_layout import KVLayout
from baton.engine.attention.registry import attention_backend
from baton.engine.cpu.runner import ModelRunner
from baton.engine.pages.kv_cache import KVCache
from bench import gpu_check, gpu_float8, gpu_model, gpu_parity, gpu_parts, gpu_tests
from bench.gpu_check import Outcome, Part, check, exit_code, run_part, table
from bench.gpu_figures import Figure
from bench.gpu_model import LLAMA_8B, random_decoder, runner_for, step_of
from bench.gpu_parts import write_figures
from tests.core.fake_runner import FakeRunner
from tests.float8_products import require_products

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    LLAMA_8B, vocab_size=1000, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, windows=(None, None),
)  # fmt: skip
WRITES_ONE_AND_A_HALF = """
import sys
from pathlib import Path
Path(sys.argv[1]).write_text('{"name": "a", "value": 1.5, "unit": "ms"}\\n{"name": "b", "val')
"""
# Of what Baton and its tests are installed with, all that the check is to do without.
ABSENT = ("fastapi", "hypothesis", "prometheus_client", "pydantic", "pytest_asyncio", "uvicorn", "uvloop")
HAVE_STAND_INS = ("crc32c", "grpc_health", "grpc_reflection")
HANGS = WRITES_ONE_AND_A_HALF + "import threading\nthreading.Event().wait()\n"


def program(name, text, out, limit_s=60.0):
    return Part(name, limit_s, (sys.executable, "-c", text, str(out / f"{name}.jsonl")))


def test_a_part_that_hangs_is_stopped_and_keeps_its_figures(tmp_path):
    outcome = run_part(program("slow", HANGS, tmp_path, limit_s=3.0), tmp_path, left_s=100.0)
    assert outcome.status == "stopped after 3 s"
    assert [figure["name"] for figure in outcome.figures] == ["a"]


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path):
    fails = program("fails", WRITES_ONE_AND_A_HALF + "raise ValueError('no such kernel')", tmp_path)
    works = program("works", WRITES_ONE_AND_A_HALF, tmp_path)
    outcomes = check(tmp_path, [fails, works], 100.0)
    assert [outcome.status for outcome in outcomes] == ["failed (1)", "done"]
    assert "no such kernel" in outcomes[0].last_lines[-1]
    assert exit_code(outcomes) == 1
    assert exit_code(outcomes[1:]) == 0
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["status"] for part in written["parts"]] == ["failed (1)", "done"]
    assert written["machine"]["torch"] == torch.__version__


def test_a_machine_without_nvidia_smi_is_described_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.driver_version() == "unknown"


def test_no_part_starts_after_the_time_is_up(tmp_path):
    outcomes = check(tmp_path, [program("late", "raise SystemExit(9)", tmp_path)], 0.0)
    assert outcomes[0].status == "no time left"
    assert not (tmp_path / "late.log").exists()


@pytest.mark.parametrize(
    ("module", "absent"),
    [("bench.gpu_transfers", ABSENT), ("bench.gpu_worker", ABSENT)]
    + [(f"bench.gpu_{name}", ABSENT + HAVE_STAND_INS) for name in ("check", "parts", "parity", "float8")],
)
def test_no_other_packages_are_imported(module, absent):
    text = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {module}"
    subprocess.run([sys.executable, "-c", text], cwd=gpu_check.ROOT, check=True)


def test_packages_that_are_missing_have_stand_ins(tmp_path, monkeypatch):
    assert gpu_check.missing_packages() == []
    monkeypatch.setattr(gpu_check, "find_spec", {"crc32c": None, "grpc_health": 1, "grpc_reflection": 1}.get)
    assert gpu_check.missing_packages() == ["crc32c"]
    text = "import crc32c, grpc_health.v1 as health; print(crc32c.__file__); print(health.__file__)"
    shows = Part("shows", 60.0, (sys.executable, "-c", text))
    assert run_part(shows, tmp_path, 60.0).status == "done"
    ours, theirs = (tmp_path / "shows.log").read_text().split()
    assert gpu_check.STAND_INS in Path(ours).parents
    assert gpu_check.STAND_INS not in Path(theirs).parents


def test_the_stand_in_of_crc32c_computes_the_same():
    text = (
        "import random, crc32c; chosen = random.Random(4)\n"
        "for size in (0, 1, 7, 8, 9, 1000): print(crc32c.crc32c(memoryview(chosen.randbytes(size)), size))"
    )
    computed = [
        subprocess.run(
            [sys.executable, "-c", text], env=gpu_check.environment(packages), check=True, capture_output=True
        ).stdout
        for packages in ((), ("crc32c",))
    ]
    assert computed[0] == computed[1]


PASSES, FAILS = "def test_it():\n    assert True\n", "def test_it():\n    raise ValueError('wrong')\n"
SKIPS = "import pytest\npytest.importorskip('no_such_package')\n"
HANGS_IN_A_TEST = "import threading\ndef test_it():\n    threading.Event().wait()\n"


def files_of(directory, **texts):
    for name, text in texts.items():
        (directory / f"test_{name}.py").write_text(text)
    return directory


def test_tests_run_beside_each_other_and_all_count(tmp_path, capfd):
    assert gpu_tests.run([str(files_of(tmp_path, passes=PASSES, skips=SKIPS))]) == 0
    assert gpu_tests.run([str(files_of(tmp_path, fails=FAILS))]) == 1
    said = capfd.readouterr().out
    assert "ValueError: wrong" in said
    assert said.splitlines()[-1].endswith("test_fails.py")


def test_tests_whose_time_is_up_say_what_has_failed(tmp_path):
    directory = files_of(tmp_path, hangs=FAILS.replace("test_it", "test_first") + HANGS_IN_A_TEST)
    command = (sys.executable, "-m", "bench.gpu_tests", str(directory))
    outcome = run_part(Part("tests", 12.0, command), tmp_path, left_s=100.0)
    assert outcome.status == "stopped after 12 s"
    assert "ValueError: wrong" in (tmp_path / "tests.log").read_text()


def test_all_parts_together_keep_to_the_limit(tmp_path):
    chosen = gpu_check.parts(tmp_path)
    assert sum(part.limit_s for part in chosen) <= gpu_check.TOTAL_S <= 540
    known = {part.name for part in chosen if "bench.gpu_parts" in part.command}
    assert known == set(gpu_parts.PARTS)


def test_the_table_shows_bars_and_what_went_wrong():
    figures = [Figure("step", 3.21, "ms", at_most=4.0).as_json(), Figure("rate", 50.0, "GB/s").as_json()]
    outcomes = [Outcome("model", "done", 9.0, figures, []), Outcome("tests", "failed (1)", 2.0, [], ["x"])]
    lines = [line.split() for line in table(outcomes).splitlines()]
    assert lines[1:] == [
        ["model", "step", "3.21", "ms", "<=", "4", "yes"],
        ["model", "rate", "50", "GB/s"],
        ["tests", "failed", "(1)", "2.0", "s"],
    ]


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure("a", 2.0, "x", at_least=2.0), True),
        (Figure("a", 1.9, "x", at_least=2.0), False),
        (Figure("a", 1.9, "x", at_most=2.0), True),
        (Figure("a", float("nan"), "x", at_most=2.0), False),
        (Figure("a", 1.0, "x"), None),
    ],
)
def test_bars(figure, met):
    assert figure.as_json().get("met") is met


def test_figures_are_on_disk_before_the_next_is_measured(tmp_path):
    path = tmp_path / "part.jsonl"

    def figures():
        yield Figure("copy bandwidth", 4000.0, "GB/s")
        assert json.loads(path.read_text())["value"] == 4000.0
        yield Figure("bf16 matrix product", 700.0, "TFLOP/s")

    write_figures(figures(), path)
    path.rename(tmp_path / "limits.jsonl")
    assert gpu_parts.read_limits(tmp_path) == gpu_parts.Limits(4e12, 7e14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_so_and_measures_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device: none of limits, ")
    written = json.loads((tmp_path / "new" / "gpu_check.json").read_text())
    assert {part["status"] for part in written["parts"]} == {"no CUDA device"}
    assert all(part["figures"] == [] for part in written["parts"])


def test_benchmark_models_run_the_steps_that_are_timed():
    """The same code as on a GPU, small, on the CPU, without graphs."""
    runner = runner_for(random_decoder(SMALL, CPU), CPU, num_blocks=20, batch_sizes=())
    for rows, tokens, start in ((2, 1, 40), (1, 70, 0)):
        result = runner.run(step_of(rows, tokens, start))
        assert [len(samples) for samples in result.samples] == [1] * rows


def on_cpu(config, dtype, num_blocks=16):
    """A decoder of random weights, and the CPU's runner of it in another dtype."""
    decoder = random_decoder(config, CPU, std=0.1)
    if dtype == "float32":
        decoder = gpu_parity.in_float32(decoder)
    else:
        decoder.pack()
    layout = KVLayout(16, config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    cache = KVCache(layout, num_blocks, CPU)
    return ModelRunner(decoder, cache, attention_backend(cache.pool, config.windows), 512, 64)


def test_float8_is_measured_beside_bfloat16():
    """The same weights twice; float8 products are torch's own for CPUs."""
    require_products(CPU)
    seconds = iter((4.0, 6.0, 2.0, 12.0))

    def timer(work, repeats=20):
        work()
        return next(seconds)

    with torch.inference_mode():
        figures = list(gpu_float8.steps(SMALL, CPU, 70, timer))
    assert [figure.value for figure in figures] == [4000.0, 2000.0, 2.0, 6000.0, 12000.0, 0.5]
    assert [figure.as_json().get("met") for figure in figures] == [None, None, True, None, None, False]


def test_logits_in_float8_are_near_those_in_bfloat16():
    require_products(CPU)
    with torch.inference_mode():
        figure = gpu_float8.cosine_of_logits(gpu_parity.SMALL, CPU)
    assert figure.as_json()["met"]
    assert figure.value < 1.0


@pytest.mark.parametrize("name", gpu_parity.MODELS)
def test_parity_holds_for_the_cpus_own_bfloat16(name):
    """So that the bars tell a wrong GPU and not a wrong comparison; CPUs round in ways of their own."""
    config = gpu_parity.MODELS[name]
    with torch.inference_mode():
        reference = gpu_parity.fed(on_cpu(config, "float32"), None)
        tokens = [token.token_id for token in reference]
        ours = gpu_parity.fed(on_cpu(config, "bfloat16"), tokens)
        wrong = gpu_parity.fed(on_cpu(config, "bfloat16"), tokens[1:] + tokens[:1])
    found = gpu_parity.agreement(ours, reference)
    assert found.num_equal >= 56
    assert 0.0 < found.worst < gpu_parity.TOLERANCE
    assert gpu_parity.agreement(wrong, reference).num_equal < 32


def test_engine_loops_are_timed_with_and_without_a_step_ahead():
    runner = FakeRunner(40, gpu_model.BLOCK_SIZE, depth=2)
    for each in (runner, gpu_parity.OneStepAtATime(runner)):
        assert gpu_parity.tokens_per_s(each, 40, num_rows=3, num_tokens=5) > 0
