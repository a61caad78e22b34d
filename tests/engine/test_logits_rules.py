"""Rules of a server's owner, found as those of any installed package are."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from baton import LLM, SamplingParams
from baton.core.errors import InvalidRequest, StartupError
from baton.core.logits_rules import to_text
from baton.engine.logits_rules import LogitsRules
from tests.e2e.processes import DEMO_MODEL

OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 16 << 20, "max_num_seqs": 4}
MODULE = """
import torch

def multiples(logits, prompt, output, arguments):
    ids = torch.arange(logits.shape[0])
    return logits.masked_fill(ids % arguments.get("of", 2) != 0, float("-inf"))

def after_prompt(logits, prompt, output, arguments):
    logits[prompt[-1] + 1 + len(output)] = float("inf")
    return logits

def broken(logits, prompt, output, arguments):
    if len(output) == 2:
        raise ValueError("two are enough")
    return logits

def flat(logits, prompt, output, arguments):
    return logits[:3]

constant = 5
"""
ENTRY_POINTS = """
[baton.logits_rules]
multiples = rules_of_this_test:multiples
after_prompt = rules_of_this_test:after_prompt
broken = rules_of_this_test:broken
flat = rules_of_this_test:flat
constant = rules_of_this_test:constant
missing = rules_of_this_test:missing
"""
NAMES = ("multiples", "after_prompt", "broken", "flat")


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("package")
    (directory / "rules_of_this_test.py").write_text(MODULE)
    information = directory / "rules_of_this_test-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rules-of-this-test\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        importlib.invalidate_caches()
        yield


@pytest.fixture(scope="module")
def llm(_package: None) -> Iterator[LLM]:
    with LLM(str(DEMO_MODEL), **OPTIONS, logits_rules=NAMES) as made:
        yield made


def asked(rules: dict[str, Any], **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "ignore_eos": True, "logits_rules": rules, **fields})


PROMPT = [10, 20, 30]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rule_changes_what_comes(llm: LLM, temperature: float) -> None:
    several = [
        asked({}, temperature=temperature, seed=1),
        asked({"multiples": None}, temperature=temperature, seed=1),
        asked({"multiples": {"of": 7}}, temperature=temperature, seed=1, n=2),
        asked({"after_prompt": {}}, temperature=temperature, seed=1),
    ]
    plain, even, sevens, counted = llm.generate([PROMPT] * 4, several, use_tqdm=False)
    assert any(token_id % 2 for token_id in plain.outputs[0].token_ids)
    assert all(token_id % 2 == 0 for token_id in even.outputs[0].token_ids)
    assert all(token_id % 7 == 0 for choice in sevens.outputs for token_id in choice.token_ids)
    assert counted.outputs[0].token_ids == list(range(31, 39))


def test_what_may_not_come_does_not_come(llm: LLM) -> None:
    """Rules are before what forbids tokens, and before each other in the order of the request."""
    forbidding = asked({"after_prompt": {}}, temperature=0.0, allowed_token_ids=[5, 6, 31])
    biased = asked({"multiples": {"of": 3}}, temperature=0.0, logit_bias={33: 100.0, 34: 100.0})
    both = asked({"after_prompt": {}, "multiples": {}}, temperature=0.0)
    outputs = llm.generate([PROMPT] * 3, [forbidding, biased, both], use_tqdm=False)
    first, second, third = (output.outputs[0].token_ids for output in outputs)
    assert first[0] == 31
    assert set(first) <= {5, 6, 31}
    assert second == [33] * 8
    assert all(token_id % 2 == 0 for token_id in third)
    assert third[1::2] == [32, 34, 36, 38]


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    plain, ruled = llm.generate(
        [PROMPT] * 2, [asked({}, logprobs=3), asked({"after_prompt": {}}, logprobs=3)], use_tqdm=False
    )
    assert plain.outputs[0].logprobs is not None
    assert ruled.outputs[0].logprobs is not None
    first = ruled.outputs[0].logprobs[0]
    assert first[31].logprob < max(entry.logprob for entry in first.values())
    likeliest = {token_id for token_id, entry in first.items() if entry.rank}
    assert likeliest <= set(plain.outputs[0].logprobs[0])


@pytest.mark.parametrize(("name", "reason"), [("broken", "two are enough"), ("flat", r"a tensor \[3\]")])
def test_a_rule_that_fails_costs_nobody_else_anything(llm: LLM, name: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{name}' failed: .*{reason}"):
        llm.generate([PROMPT] * 3, [asked({}), asked({name: {}}), asked({})], use_tqdm=False)
    assert len(llm.generate([PROMPT], asked({}), use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_rules_that_are_not_there(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no logits rule 'constant'"):
        llm.generate([PROMPT], asked({"constant": {}}), use_tqdm=False)
    for name, reason in (("nobodys", "there are .*broken"), ("missing", "missing"), ("constant", "int")):
        with pytest.raises(StartupError, match=reason):
            LogitsRules.load([name])


@pytest.mark.parametrize("wrong", [[], "x", {"a": 5}, {"a": {"b": {1, 2}}}])
def test_what_is_no_object_of_arguments(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="logits_rules"):
        to_text(wrong)


def test_a_rule_can_not_change_a_sequence() -> None:
    def spiteful(logits: Any, prompt: Any, output: Any, arguments: Any) -> Any:
        prompt.append(5)

    rules = LogitsRules({"spiteful": spiteful}).of_request(to_text({"spiteful": {}}))
    assert rules is not None
    rules.apply(torch.zeros(4), [1], [])
    assert rules.failure is not None
    assert "AttributeError" in rules.failure
