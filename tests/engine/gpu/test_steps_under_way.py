"""The GPU's runner with a step ahead: the same calls on tensors of the CPU where there is no GPU."""

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.config import EngineConfig
from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.sampling import SamplingParams
from baton.engine.factory import load_engine
from baton.engine.models.decoder import Decoder
from tests.checkpoints import write_checkpoint
from tests.colocated import ColocatedEngine
from tests.engine.driver import make_prompt
from tests.engine.gpu.runners import gpu_runner

OPTIONS = EngineConfig(
    kv_cache_bytes=1 << 20, device="cpu", dtype="float32", max_num_seqs=4, max_num_batched_tokens=12
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
KINDS = {
    "greedy": replace(GREEDY, max_tokens=7),
    "drawn": SamplingParams(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, seed=3, max_tokens=4),
    "two choices": SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=3),
    "log probabilities": replace(GREEDY, num_logprobs=3),
    "penalties": replace(GREEDY, repetition_penalty=1.5, frequency_penalty=0.4, logit_bias=((7, 2.0),)),
    "min_tokens": SamplingParams(seed=2, max_tokens=5, min_tokens=3, stop_token_ids=tuple(range(0, 160, 2))),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The interpreter takes a second for a few tokens of the other checkpoints."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), num_hidden_layers=1, max_position_embeddings=64)


def colocated(directory, device, *, on_device, eager=False):
    """An engine with the CPU's runner, or with the GPU's."""
    engine = ColocatedEngine(directory, replace(OPTIONS, device=device.type if on_device else "cpu"))
    if on_device:
        object.__setattr__(engine.engine, "runner", Plans(gpu_runner(engine.engine, eager=eager)))
    return engine


class Plans:
    """A runner that keeps the plans that it is given."""

    def __init__(self, runner):
        self.depth = runner.depth
        self.plans = []
        self._runner = runner

    def submit(self, plan, layers_done=None):
        self.plans.append(plan)
        return self._runner.submit(plan, layers_done)


@pytest.mark.parametrize("eager", [False, True])
def test_steps_ahead_give_the_cpus_tokens(small, device, eager):
    """Prompts in chunks beside decode, batches that no graph has the size of, outputs that end on a token."""
    prompts = {kind: make_prompt(5 + 4 * index) for index, kind in enumerate(KINDS)}
    answers = []
    for on_device in (False, True):
        engine = colocated(small, device, on_device=on_device, eager=eager)
        answers.append(engine.generate_each([(prompts[kind], KINDS[kind]) for kind in KINDS]))
    for kind, theirs, ours in zip(KINDS, *answers, strict=True):
        for our, their in zip(ours, theirs, strict=True):
            assert [token.token_id for token in our] == [token.token_id for token in their], kind
            for one, other in zip(our, their, strict=True):
                assert [i for i, _ in one.top_logprobs] == [i for i, _ in other.top_logprobs]
    followers = {
        task.params
        for plan in engine.engine.runner.plans
        for row in plan.rows
        for task in row.samples
        if row.follows is not None
    }
    assert followers == set(KINDS.values()) - {KINDS["penalties"]}


def test_a_stop_token_ends_an_output_in_time(small, device):
    """The step after it was under way already; its token is not said, and its pages come back."""
    [[free]] = colocated(small, device, on_device=False).generate([make_prompt(9)], GREEDY)
    stop = free[1].token_id
    end = [token.token_id for token in free].index(stop) + 1
    engine = colocated(small, device, on_device=True)
    [[ended]] = engine.generate([make_prompt(9)], replace(GREEDY, stop_token_ids=(stop,)))
    assert [token.token_id for token in ended] == [token.token_id for token in free[:end]]
    assert len(engine.engine.runner.plans) == end + 1


def test_graphs_and_eager_steps_are_bit_equal(small, device):
    """Tokens and log probabilities, at a batch size that there is a graph for."""
    prompts = [make_prompt(length) for length in (1, 4, 2, 3)]
    graphs, eager = (
        colocated(small, device, on_device=True, eager=eager).generate(prompts, KINDS["log probabilities"])
        for eager in (False, True)
    )
    assert graphs == eager


def test_a_step_that_fails_to_be_submitted_spoils_nothing(small, device, monkeypatch):
    engine = colocated(small, device, on_device=True)
    expected = engine.token_ids([make_prompt(9)], GREEDY)
    runner = engine.engine.runner

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", fail)
        row = ScheduledRow([1, 2], 0, [0], (SampleTask(GREEDY, 0, 2, [1, 2], []),))
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.submit(StepPlan((row,)))
    assert engine.token_ids([make_prompt(9)], GREEDY) == expected


def test_a_step_that_samples_nothing_computes_no_logits(small, device, monkeypatch):
    engine = colocated(small, device, on_device=True).engine
    monkeypatch.setattr(Decoder, "logits", None)
    result = engine.runner.submit(StepPlan((ScheduledRow(make_prompt(9), 0, [0]),))).collect()
    assert result.samples == ((),)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device, but for what Triton's interpreter does by itself."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if any(read in function.name() for read in self.READS):
            self.note(function.name())
        return function(*arguments, **(keywords or {}))

    def note(self, name):
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if "triton" in frame.f_code.co_filename.split("/"):
                return
            frame = frame.f_back
        self.count[name] += 1


@contextmanager
def counted_waits(monkeypatch):
    waits = Waits()

    def counting(owner, name):
        original = getattr(owner, name)

        def counted(*arguments, **keywords):
            waits.note(name)
            return original(*arguments, **keywords)

        patch.setattr(owner, name, counted)

    with monkeypatch.context() as patch, waits:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            counting(torch.Tensor, name)
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            counting(owner, "synchronize")
        yield waits.count


def decode_plans(engine, params, num_rows=3):
    """A step whose rows follow the one that was submitted before it, and that one."""
    prompts = [make_prompt(5 + index) for index in range(num_rows)]

    def task(prompt, position):
        return SampleTask(params, params.seed, position, prompt, [])

    first = StepPlan(
        tuple(
            ScheduledRow(prompt, 0, [index], (task(prompt, len(prompt)),))
            for index, prompt in enumerate(prompts)
        )
    )
    then = StepPlan(
        tuple(
            ScheduledRow((0,), len(prompt), [index], (task(prompt, len(prompt) + 1),), follows=index)
            for index, prompt in enumerate(prompts)
        )
    )
    return first, then


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("params", [GREEDY, KINDS["drawn"], KINDS["log probabilities"]])
def test_a_step_is_submitted_without_a_wait(small, device, monkeypatch, params, eager):
    """And collected with one, of the copies that were begun when it was submitted."""
    engine = colocated(small, device, on_device=True, eager=eager).engine
    first, then = decode_plans(engine, params)
    before = engine.runner.submit(first)
    with counted_waits(monkeypatch) as waits:
        submitted = engine.runner.submit(then)
        assert dict(waits) == {}
    before.collect()
    with counted_waits(monkeypatch) as waits:
        result = submitted.collect()
        num_tensors = 5 if params.num_logprobs is not None else 1
        assert waits.pop("synchronize", 0) <= 1
        assert dict(waits) == {"tolist": num_tensors}, "of tensors that lie on the host by then"
    assert [len(samples) for samples in result.samples] == [1, 1, 1]


def test_waits_are_seen(monkeypatch):
    """The count above is only as good as this."""
    tensor = torch.arange(4)
    with counted_waits(monkeypatch) as waits:
        tensor.tolist()
        tensor[0].item()
        bool(tensor[0] == 0)
        int(tensor[1])
        tensor.nonzero()
        tensor.cpu()
        assert {"tolist", "item", "cpu", "aten::nonzero", "aten::_local_scalar_dense"} <= waits.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, KINDS["drawn"], KINDS["penalties"], KINDS["log probabilities"]])
def test_the_device_sees_no_wait_either(small, params):
    """A decode step of the engine that a worker loads, with torch's own eye on it."""
    engine = load_engine(small, replace(OPTIONS, device="cuda"))
    first, then = decode_plans(engine, params)
    for _ in range(2):
        engine.runner.submit(first).collect()
        engine.runner.submit(first)
        torch.cuda.set_sync_debug_mode("error")
        try:
            submitted = engine.runner.submit(then)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        submitted.collect()


@pytest.mark.gpu
def test_the_device_has_ended_a_step_that_is_collected(small):
    """One that samples nothing too: its pages are read, and given to others, without a wait."""
    engine = load_engine(small, replace(OPTIONS, device="cuda"))
    plan = StepPlan((ScheduledRow(make_prompt(40), 0, [0, 1, 2]),))
    for _ in range(5):
        engine.runner.submit(plan).collect()
        assert torch.cuda.current_stream().query()
