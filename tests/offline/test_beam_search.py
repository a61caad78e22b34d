"""Beams and candidates: the same as transformers finds, and as single requests give."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from baton import LLM, BeamSearchParams, SamplingParams
from baton.core.errors import InvalidRequest
from baton.core.sampling import choice_seed
from tests.checkpoints import write_checkpoint
from tests.e2e.processes import DEMO_MODEL

PROMPTS = [[5, 9, 33, 2, 7], list(range(20, 60)), [120], [3, 4] * 30]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so small that probabilities are close and many beams end early."""
    directory = write_checkpoint(tmp_path_factory.mktemp("beams"), vocab_size=4096, eos_token_id=[1, 7, 40])
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO_MODEL / name, directory)
    return directory


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", kv_cache_bytes=16 << 20, max_num_seqs=8) as made:
        yield made


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # which would fill in for none
    return model


@pytest.mark.parametrize(("width", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 0.0), (5, 2.0), (3, -1.0)])
@pytest.mark.parametrize("ends", [True, False])
def test_the_beams_are_transformers(
    llm: LLM, reference: Any, width: int, length_penalty: float, ends: bool
) -> None:
    params = BeamSearchParams(width, 12, ignore_eos=not ends, length_penalty=length_penalty)
    outputs = llm.beam_search(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            generation_config=GenerationConfig(
                num_beams=width,
                num_return_sequences=width,
                max_new_tokens=12,
                length_penalty=length_penalty,
                do_sample=False,
                eos_token_id=[1, 7, 40] if ends else None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
        found = [sequence.tokens for sequence in output.sequences]
        assert found == [_without_end(row.tolist(), len(prompt), ends) for row in expected.sequences]
        if width > 1:
            lengths = [len(sequence.logprobs) for sequence in output.sequences]
            scores = [
                sequence.cum_logprob / length**length_penalty
                for sequence, length in zip(output.sequences, lengths, strict=True)
            ]
            assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-3)


def _without_end(token_ids: list[int], num_prompt: int, ends: bool) -> list[int]:
    """Up to the first end token of the answer, as padding follows it."""
    answer = token_ids[num_prompt:]
    places = [place for place, token_id in enumerate(answer) if token_id in (1, 7, 40)] if ends else []
    return token_ids[: num_prompt + places[0]] if places else token_ids


def test_log_probabilities_are_told_where_they_are_asked_for(llm: LLM) -> None:
    for choice in ({"use_beam_search": True}, {"best_of": 4}):
        settings: dict[str, Any] = {"n": 2, "max_tokens": 4, **choice}
        [plain] = llm.generate([PROMPTS[0]], SamplingParams(**settings), use_tqdm=False)
        [asked] = llm.generate([PROMPTS[0]], SamplingParams(**settings, logprobs=1), use_tqdm=False)
        assert all(each.logprobs is None for each in plain.outputs)
        assert all(each.logprobs and len(each.logprobs) == len(each.token_ids) for each in asked.outputs)


def test_some_beams_end_before_their_length(llm: LLM) -> None:
    """Else the test above would say nothing of beams that end."""
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(4, 12), use_tqdm=False)
    reasons = {sequence.finish_reason for output in outputs for sequence in output.sequences}
    assert reasons == {"stop", "length"}


def test_the_best_of_several_candidates(llm: LLM) -> None:
    """They are what single requests with the seeds of the choices give, judged by their mean."""
    settings = {"temperature": 1.0, "max_tokens": 10, "logprobs": 2}
    [found] = llm.generate([PROMPTS[0]], SamplingParams(**settings, seed=3, n=2, best_of=7), use_tqdm=False)
    seeds = [choice_seed(3, choice) for choice in range(7)]
    singles = llm.generate(
        [PROMPTS[0]] * 7, [SamplingParams(**settings, seed=seed) for seed in seeds], use_tqdm=False
    )
    candidates = [output.outputs[0] for output in singles]
    candidates.sort(key=lambda each: (each.cumulative_logprob or 0) / len(each.token_ids), reverse=True)
    assert [choice.token_ids for choice in found.outputs] == [each.token_ids for each in candidates[:2]]
    assert found.outputs[0].logprobs == candidates[0].logprobs
    assert [choice.index for choice in found.outputs] == [0, 1]
    plain = SamplingParams(temperature=1.0, max_tokens=10, seed=3, n=2, best_of=7)
    [without] = llm.generate([PROMPTS[0]], plain, use_tqdm=False)
    assert [choice.token_ids for choice in without.outputs] == [each.token_ids for each in candidates[:2]]
    assert without.outputs[0].logprobs is None


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 3, "best_of": 2}, "best_of", "best_of"),
    ({"best_of": 129}, "best_of", "128"),
    ({"length_penalty": 0.5}, "length_penalty", "use_beam_search"),
    ({"use_beam_search": True, "length_penalty": 1e9}, "length_penalty", "100"),
    ({"use_beam_search": True, "stop": ["x"]}, "stop", "together"),
    ({"use_beam_search": True, "presence_penalty": 0.5}, "presence_penalty", "together"),
    ({"use_beam_search": True, "min_tokens": 2, "max_tokens": 9}, "min_tokens", "together"),
    ({"use_beam_search": True, "n": 128, "stop_token_ids": list(range(9, 20))}, "n", "beams"),
]


@pytest.mark.parametrize(("fields", "param", "word"), WRONG, ids=str)
def test_what_does_not_go_together(llm: LLM, fields: dict[str, Any], param: str, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as refused:
        llm.generate([PROMPTS[0]], SamplingParams(**fields), use_tqdm=False)
    assert refused.value.param == param
