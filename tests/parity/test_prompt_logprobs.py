"""Log probabilities of prompts against transformers, whatever chunks and caches they are computed in."""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton import LLM, SamplingParams
from tests.e2e.processes import DEMO_MODEL

PROMPTS = [
    [(7 * index + 31 * row) % 4000 + 4 for index in range(count)] for row, count in enumerate((1, 2, 40, 90))
]
COUNT = 3


@pytest.fixture(scope="module", params=[512, 7], ids=["whole", "in chunks"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = {"dtype": "float32", "kv_cache_bytes": 16 << 20, "max_num_batched_tokens": request.param}
    with LLM(str(DEMO_MODEL), **options) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        return [torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1) for prompt in PROMPTS]


def test_they_are_transformers_own(llm: LLM, expected: list[torch.Tensor]) -> None:
    params = SamplingParams(
        prompt_logprobs=COUNT, max_tokens=3, temperature=0.0, logprobs=COUNT, ignore_eos=True
    )
    for _ in range(2):  # the prefix cache, which knows the prompts by then, has no logits
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for prompt, output, logprobs in zip(PROMPTS, outputs, expected, strict=True):
            if len(prompt) == 1:
                assert output.prompt_logprobs is None
                continue
            assert output.prompt_logprobs is not None
            first, *others = output.prompt_logprobs
            assert first is None
            assert len(others) == len(prompt) - 1
            for position, found in enumerate(others):
                assert found is not None
                row = logprobs[position]
                for token_id, entry in found.items():
                    assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
                assert set(row.topk(COUNT).indices.tolist()) | {prompt[position + 1]} == set(found)


def test_others_find_what_such_a_prompt_has_computed(llm: LLM) -> None:
    prompt = [9] * 64
    llm.generate([prompt], SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False)
    [output] = llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
    assert output.num_cached_tokens == 48
    assert output.prompt_logprobs is None


def test_choices_share_them(llm: LLM) -> None:
    params = SamplingParams(prompt_logprobs=1, max_tokens=2, n=3, seed=4)
    [output] = llm.generate([PROMPTS[2]], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPTS[2])


def test_torchs_path_is_the_same(expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from baton.engine import sampler

    monkeypatch.setattr(sampler, "cpu_kernels", lambda: None)
    with LLM(str(DEMO_MODEL), dtype="float32", kv_cache_bytes=16 << 20) as made:
        [output] = made.generate(
            [PROMPTS[3]], SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False
        )
    assert output.prompt_logprobs is not None
    for position, found in enumerate(output.prompt_logprobs[1:]):
        token_id = PROMPTS[3][position + 1]
        assert found is not None
        assert found[token_id].logprob == pytest.approx(float(expected[3][position][token_id]), abs=1e-3)
