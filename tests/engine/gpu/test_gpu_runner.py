"""What a GPU's engine does besides kernels; all but the marked ones run without a GPU too."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.config import EngineConfig, WorkerConfig
from baton.core.errors import StartupError
from baton.core.kv_layout import KVLayout
from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.sampling import SampledToken, SamplingParams
from baton.engine import devices, factory, layer_groups
from baton.engine.factory import load_engine
from baton.engine.gpu.device_logprobs import add_logprobs, logprobs_on_device
from baton.engine.gpu.device_sampler import sample_on_device
from baton.engine.gpu.graphs import graph_batch_sizes, graph_for
from baton.engine.gpu.host_copies import HostCopies
from baton.engine.gpu.runner import largest_step
from baton.engine.pages.memory import PoolSize, kv_cache_bytes_on_gpu, num_blocks_for, require_page_size
from baton.engine.sampler import sample
from tests.core.grammars import Allowing
from tests.engine.driver import Driver, Request, make_prompt
from tests.engine.gpu.runners import gpu_runner

MIB = 1 << 20


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (16, (1, 2, 4, 8, 16)),
        (17, (1, 2, 4, 8, 16, 17)),
        (64, (1, 2, 4, 8, 16, 32, 48, 64)),
        (70, (1, 2, 4, 8, 16, 32, 48, 64, 70)),
    ],
)
def test_graph_batch_sizes(most, sizes):
    assert graph_batch_sizes(most) == sizes
    for rows in range(1, most + 1):
        chosen = graph_for(rows, sizes)
        assert chosen == min(size for size in sizes if size >= rows)
    assert graph_for(most + 1, sizes) is None


def test_memory_left_for_pages():
    assert kv_cache_bytes_on_gpu(total=1000, elsewhere=100, peak=300, utilization=0.9) == 510
    # Two engines on one GPU, each with its share, whichever comes first.
    assert kv_cache_bytes_on_gpu(total=1000, elsewhere=10, peak=100, utilization=0.45) == 350
    assert kv_cache_bytes_on_gpu(total=1000, elsewhere=470, peak=100, utilization=0.45) == 350
    with pytest.raises(
        StartupError, match=r"--gpu-memory-utilization 0.5 allows; raise it, lower --max-num-b"
    ):
        kv_cache_bytes_on_gpu(total=1000 * MIB, elsewhere=100 * MIB, peak=600 * MIB, utilization=0.5)


@pytest.mark.parametrize(
    ("tokens", "seqs", "lengths"), [(10, 4, [1, 1, 1, 7]), (3, 9, [1, 1, 1]), (5, 1, [5])]
)
def test_the_largest_step_has_all_tokens_and_rows(tokens, seqs, lengths):
    plan = largest_step(4, tokens, seqs)
    assert [len(row.token_ids) for row in plan.rows] == lengths
    assert all(len(row.block_table) * 4 >= len(row.token_ids) for row in plan.rows)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", "update the driver"),
        ("Found no NVIDIA driver on your system.\nPlease check", "no NVIDIA driver is found; install one"),
        ("No CUDA GPUs are available", "finds no GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES"),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / "
            "cuda driver combination\nmore",
            "Error 803: system has unsupported display driver / cuda driver combination. Or use",
        ),
        ("CUDA unknown error\nmore", "CUDA unknown error. Or use --device cpu."),
    ],
)
def test_no_cuda_says_what_to_do(monkeypatch, message, says):
    def fail():
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(StartupError, match=says) as raised:
        devices.resolve_device("cuda")
    assert "\n" not in str(raised.value)
    assert devices.resolve_device("auto").type == "cpu"


def test_torch_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(StartupError, match="built without CUDA; install one"):
        devices.resolve_device("cuda")


def test_bfloat16_needs_a_device_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    with pytest.raises(StartupError, match="use --dtype fp16"):
        devices.require_dtype(torch.bfloat16, torch.device("cuda"))
    devices.require_dtype(torch.float16, torch.device("cuda"))


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_workers_of_every_role_may_use_a_gpu(tmp_path, role):
    config = WorkerConfig(
        role, tmp_path, "127.0.0.1:1", "127.0.0.1:1", "id", engine=EngineConfig(device="cuda")
    )
    assert config.engine.device == "cuda"


def test_device_options_are_checked():
    with pytest.raises(StartupError, match="unknown device 'gpu': use auto, cpu, cuda"):
        EngineConfig(device="gpu")
    with pytest.raises(StartupError, match="gpu-memory-utilization"):
        EngineConfig(gpu_memory_utilization=1.5)


def test_a_pool_too_small_names_the_option_that_set_it():
    layout = KVLayout(16, 2, 2, 16, "bfloat16")
    with pytest.raises(
        StartupError, match=r"raise --gpu-memory-utilization or lower --max-model-len to 32\."
    ):
        num_blocks_for(layout, PoolSize(3 * layout.bytes_per_block, "--gpu-memory-utilization"), 4096)
    with pytest.raises(StartupError, match="raise --kv-cache-memory to 1028KiB or lower"):
        num_blocks_for(layout, PoolSize(3 * layout.bytes_per_block), 4096)


@pytest.mark.parametrize(("num_layers", "most"), [(1, 8192), (32, 4096)])
def test_a_page_too_large_says_which_size_is_not(num_layers, most):
    """Of a layer, and of all of them."""
    for block_size in (16, most):
        require_page_size(KVLayout(block_size, num_layers, 8, 128, "bfloat16"))
    with pytest.raises(StartupError, match=rf"lower --block-size to {most} or less\."):
        require_page_size(KVLayout(most + 1, num_layers, 8, 128, "bfloat16"))


def test_without_graphs_each_way_to_split_contexts_is_compiled_at_start():
    steps = []

    class Runner:
        def submit(self, plan):
            steps.append([len(row.token_ids) for row in plan.rows])
            return self

        def collect(self):
            pass

        idle = collect

    store: Any = SimpleNamespace(padding_block=3, layout=KVLayout(16, 1, 1, 16, "float32"))
    runner: Any = Runner()
    factory._warm_up(runner, store, 6)
    assert steps == [[2], [1], [1], [1] * 2, [1] * 4, [1] * 6]


def mixed_tasks():
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=9, logit_bias=((3, 4.0), (3, 1.0), (999, 5.0))),
        SamplingParams(top_p=0.8, presence_penalty=1.0, num_logprobs=4, logprob_token_ids=(3, 11)),
        SamplingParams(
            temperature=0.0, repetition_penalty=1.3, allowed_token_ids=(4, 8), bad_words=((4, 8),)
        ),
        SamplingParams(min_p=0.02, temperature=1.4, min_tokens=4, stop_token_ids=(1, 2, 999)),
    ]
    prompt = [1, 2, 3, 999]
    tasks = [
        (line % 4, SampleTask(kinds[line % 5], 2**64 - 1 - line, 7, prompt, [4, 4, line]))
        for line in range(10)
    ]
    grammars = [Allowing({5, 9, 30}), Allowing({1, 2}), Allowing({40})]  # the second against `min_tokens`
    kinds = [kinds[1], kinds[4], kinds[0]]
    with_grammars = [
        (line, SampleTask(kind, line, 5, prompt, [4], grammar.matcher()))
        for line, (kind, grammar) in enumerate(zip(kinds, grammars, strict=True))
    ]
    return [*tasks, *with_grammars]


def test_samples_as_the_cpu_does(device):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[2, 7] = float("nan")
    expected = sample(logits, mixed_tasks())
    tasks, logits = mixed_tasks(), logits.to(device)
    token_ids = sample_on_device(logits, tasks)
    assert token_ids.tolist() == [token.token_id for token in expected]
    tokens = [SampledToken(token_id) for token_id in token_ids.tolist()]
    for logprobs in logprobs_on_device(logits, tasks, token_ids):
        add_logprobs(tokens, logprobs, tasks, HostCopies(logprobs.tensors).wait())
    for ours, theirs in zip(tokens, expected, strict=True):
        assert ours.logprob == (theirs.logprob and pytest.approx(theirs.logprob, abs=1e-5))
        assert [token for token, _ in ours.top_logprobs] == [token for token, _ in theirs.top_logprobs]
        for (_, our), (_, their) in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
            assert our == pytest.approx(their, abs=1e-5)


def test_tells_of_layers_as_they_are_queued(device, checkpoint, monkeypatch):
    """In groups, as the CPU's runner does when it has computed them, and never of the last one."""
    if device.type == "cuda":
        pytest.skip("one engine's weights and pages lie on one device")
    monkeypatch.setattr(layer_groups, "_MIN_GROUP_BYTES", 1)
    engine = load_engine(checkpoint("llama"), EngineConfig(kv_cache_bytes=4 * MIB, device="cpu"))
    row = ScheduledRow(list(range(20)), 0, [0, 1])
    told, before_collect = ([], []), []
    for made, ends in zip((engine.runner, gpu_runner(engine)), told, strict=True):
        submitted = made.submit(StepPlan((row,), num_leaving_blocks=1), ends.append)
        before_collect.append(len(ends))
        submitted.collect()
    assert told[0] == told[1]
    assert told[0][-1] < engine.config.num_layers
    assert before_collect == [0, len(told[1])]


def test_the_lowest_ids_of_equal_log_probabilities_come_first(device):
    """In bfloat16 many logits are equal; more tasks than are computed at a time."""
    logits = torch.randint(0, 3, (40, 50), generator=torch.Generator().manual_seed(1)).bfloat16()
    tasks = [
        (line, SampleTask(SamplingParams(temperature=0.0, num_logprobs=line % 7), 0, 1, [0], []))
        for line in range(40)
    ]
    expected = sample(logits, tasks)
    token_ids = torch.tensor([token.token_id for token in expected], device=device)
    tokens = [SampledToken(token.token_id) for token in expected]
    for logprobs in logprobs_on_device(logits.to(device), tasks, token_ids):
        add_logprobs(tokens, logprobs, tasks, HostCopies(logprobs.tensors).wait())
    for ours, theirs in zip(tokens, expected, strict=True):
        assert [token for token, _ in ours.top_logprobs] == [token for token, _ in theirs.top_logprobs]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_graphs_and_eager_are_bit_equal(checkpoint, name):
    """The same tokens with the same log probabilities, at batch sizes that graphs were captured for."""
    sampled = []
    for eager in (False, True):
        options = EngineConfig(
            dtype="bfloat16", device="cuda", kv_cache_bytes=4 * MIB, enforce_eager=eager, max_num_seqs=4
        )
        engine = load_engine(checkpoint(name), options)
        params = SamplingParams(temperature=0.0, num_logprobs=3)
        requests = [Request(make_prompt(length), params) for length in (5, 37, 20, 64)]
        Driver(engine).generate(requests, 32)
        sampled.append([request.sampled for request in requests])
    assert sampled[0] == sampled[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_gpu_gives_the_cpus_tokens(checkpoint, name):
    """float32 on both: the same greedy tokens."""
    outputs = []
    for device in ("cpu", "cuda"):
        options = EngineConfig(dtype="float32", device=device, kv_cache_bytes=4 * MIB, max_num_seqs=4)
        requests = [Request(make_prompt(length)) for length in (5, 37)]
        Driver(load_engine(checkpoint(name), options)).generate(requests, 32, chunk=16)
        outputs.append([request.output for request in requests])
    matches = [
        a == b for ours, theirs in zip(*outputs, strict=True) for a, b in zip(ours, theirs, strict=True)
    ]
    assert sum(matches) >= 60 / 64 * len(matches)
