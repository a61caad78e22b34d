"""The engine's tokens and log probabilities are transformers' own."""

import pytest
import torch

from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.sampling import SamplingParams
from tests.checkpoints import reference_greedy, reference_logprobs
from tests.engine.conftest import MODELS
from tests.engine.driver import GREEDY_LOGPROBS, Driver, Request, make_prompt

NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 16, 37, 90)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_batch_equals_transformers(name, engine, reference):
    """Unequal lengths in one batch, prompts whole."""
    requests = [Request(make_prompt(length), GREEDY_LOGPROBS) for length in PROMPT_LENGTHS]
    Driver(engine(name)).generate(requests, NUM_TOKENS)
    model = reference(name)
    for request in requests:
        assert request.output == reference_greedy(model, request.prompt, NUM_TOKENS)
        expected = reference_logprobs(model, request.token_ids)[len(request.prompt) - 1 : -1]
        for line, token in zip(expected, request.sampled, strict=True):
            assert token.logprob == pytest.approx(float(line[token.token_id]), abs=1e-3)
            top = line.topk(3)
            assert [token_id for token_id, _ in token.top_logprobs] == top.indices.tolist()
            assert [value for _, value in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window-yarn", "qwen3-window"])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_chunked_prefill_mixed_with_decode(name, block_size, engine, reference):
    """Requests join while others decode; prompts in chunks that end anywhere in a page."""
    driver = Driver(engine(name, block_size=block_size), seed=block_size)
    requests = [Request(make_prompt(length, seed=1)) for length in PROMPT_LENGTHS]
    for joined, chunk in enumerate((5, 11, 1), start=1):
        for _ in range(4):
            driver.step([(r, min(chunk, r.num_remaining)) for r in requests[:joined]])
    driver.generate(requests, 32, chunk=13)
    for request in requests:
        assert request.output[:32] == reference_greedy(reference(name), request.prompt, 32)


def test_long_prompt_over_several_query_blocks(engine, reference):
    """Attention masks are made for 512 queries at a time; here a chunk has more."""
    name = "mistral-window"
    request = Request(make_prompt(200))
    driver = Driver(engine(name))
    driver.step([(request, 3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baton_kernels.reference._QUERIES_PER_MASK", 64)
        driver.step([(request, 197)])
    driver.generate([request], 8)
    assert request.output == reference_greedy(reference(name), request.prompt, 8)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-window"])
def test_poisoned_pages_do_not_leak(name, engine):
    """NaN and infinity in every slot that holds no token of a request change nothing, to the last bit."""
    clean = [Request(make_prompt(length), GREEDY_LOGPROBS) for length in (3, 16, 37)]
    Driver(engine(name)).generate(clean, 24, chunk=10)
    poisoned_engine = engine(name)
    poisoned_engine.page_store.pool.fill_(float("nan"))
    poisoned_engine.page_store.pool[::2].fill_(float("inf"))
    poisoned = [Request(make_prompt(length), GREEDY_LOGPROBS) for length in (3, 16, 37)]
    Driver(poisoned_engine).generate(poisoned, 24, chunk=10)
    for ours, theirs in zip(poisoned, clean, strict=True):
        assert ours.sampled == theirs.sampled


def test_block_copies_come_first_and_in_order(engine):
    """A fork that starts on copied pages continues as the original does."""
    driver = Driver(engine("llama"))
    original = Request(make_prompt(20))
    driver.generate([original], 1)
    spare, fork_pages = driver.free.pop(), [driver.free.pop(), driver.free.pop()]
    first, second = original.block_table
    copies = ((first, spare), (spare, fork_pages[0]), (second, fork_pages[1]))
    task = SampleTask(driver_params(), 0, 21, original.prompt, original.output)
    row = ScheduledRow(original.output, 20, fork_pages, (task,))
    forked = driver.engine.runner.submit(StepPlan((row,), copies)).collect().samples[0][0].token_id
    driver.generate([original], 2)
    assert forked == original.output[1]


def test_several_samples_of_one_row(engine):
    """n choices come from one row of logits, each with its own seed; rows without samples give none."""
    driver = Driver(engine("llama"))
    params = SamplingParams(temperature=1.0)
    prompt = make_prompt(9)
    table = [driver.free.pop()]

    def tasks(seeds):
        return tuple(SampleTask(params, seed, 9, prompt, []) for seed in seeds)

    silent = ScheduledRow(prompt[:4], 0, [driver.free.pop()])
    plan = StepPlan((silent, ScheduledRow(prompt, 0, table, tasks(range(40)))))
    result = driver.engine.runner.submit(plan).collect()
    assert result.samples[0] == ()
    assert len({token.token_id for token in result.samples[1]}) > 1
    plan = StepPlan((ScheduledRow(prompt, 0, table, tasks([17])),))
    alone = driver.engine.runner.submit(plan).collect()
    assert alone.samples[0][0] == result.samples[1][17]


def test_step_without_samples(engine):
    driver = Driver(engine("llama"))
    row = ScheduledRow([1, 2, 3], 0, [driver.free.pop()])
    assert driver.engine.runner.submit(StepPlan((row,))).collect().samples == ((),)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close(dtype, engine, reference):
    """Half precision follows float32's distribution within its rounding."""
    loaded = engine("qwen3", dtype=dtype)
    prompt = make_prompt(40)
    driver, request = Driver(loaded), Request(prompt, SamplingParams(temperature=0.0, num_logprobs=1))
    driver.generate([request], 8)
    expected = reference_logprobs(reference("qwen3"), request.token_ids)[len(prompt) - 1 : -1]
    assert torch.tensor([token.logprob for token in request.sampled]) == pytest.approx(
        expected.gather(1, torch.tensor(request.output)[:, None])[:, 0], abs=0.25
    )


def driver_params() -> SamplingParams:
    return SamplingParams(temperature=0.0)
