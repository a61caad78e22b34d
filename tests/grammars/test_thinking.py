"""Limits on thinking: what may come is a function of the output's tokens, with and without a format."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from baton.core.errors import InvalidRequest
from baton.core.grammar import Grammar
from baton.grammars import formats
from baton.grammars.compiler import GrammarCompiler
from baton.grammars.formats import Format, thinking_budget
from baton.tokenizer.backend import read_tokenizer
from tests.e2e.processes import DEMO_MODEL

VOCABULARY_SIZE, END = 4096, 1
TOKENIZER = read_tokenizer(DEMO_MODEL).backend
BEGIN_MARK, END_MARK = "<think>", "</think>"
ANY_TEXT: Format = {"type": "any_text"}
THINKING: Format = {"type": "tag", "begin": BEGIN_MARK, "content": ANY_TEXT, "end": END_MARK}
NUMBER: Format = {"type": "regex", "pattern": "[0-9]{3}"}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(DEMO_MODEL, VOCABULARY_SIZE, [END])


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def limited(
    compiler: GrammarCompiler, max_tokens: int, content: Format | None = None, **fields: Any
) -> Grammar:
    form = thinking_budget(
        [BEGIN_MARK], [END_MARK], max_tokens, is_open=fields.get("is_open", False), content=content
    )
    return compiler.compile(formats.to_text(form))


def tokens_of(mask: bytes) -> list[int]:
    return [token_id for token_id in range(8 * len(mask)) if mask[token_id // 8] >> token_id % 8 & 1]


def answer(grammar: Grammar, wanted: Sequence[int]) -> list[int]:
    """What comes of a model that wants these tokens, and then its end token: the first other one that may
    come where it may not say what it wants."""
    output, matcher, left = list[int](), grammar.matcher(), list(wanted)
    while len(output) < 100:
        allowed = tokens_of(matcher.allowed(output))
        assert matcher.failure is None
        assert allowed == tokens_of(grammar.matcher().allowed(output)), "another worker says otherwise"
        want = left[0] if left else END
        token_id = want if want in allowed else allowed[0]
        if token_id == want and left:
            del left[0]
        if token_id == END:
            break
        output.append(token_id)
    return output


THOUGHT = ids(" one two three four five six seven eight nine")


@pytest.mark.parametrize("budget", [0, 1, 3, len(THOUGHT)])
@pytest.mark.parametrize("is_open", [True, False])
def test_thinking_ends_when_its_tokens_are_used_up(
    compiler: GrammarCompiler, budget: int, is_open: bool
) -> None:
    begin = [] if is_open else ids(BEGIN_MARK)
    output = answer(limited(compiler, budget, is_open=is_open), [*begin, *THOUGHT])
    assert output[: len(begin) + budget] == [*begin, *THOUGHT[:budget]]
    assert output[len(begin) + budget :][: len(ids(END_MARK))] == ids(END_MARK)
    assert output[len(begin) + budget + len(ids(END_MARK)) :] == THOUGHT[budget:]


def test_thinking_that_ends_by_itself_is_left_alone(compiler: GrammarCompiler) -> None:
    wanted = [*ids(BEGIN_MARK + " a b" + END_MARK), *THOUGHT, *THOUGHT]
    assert answer(limited(compiler, 20), wanted) == wanted
    assert answer(limited(compiler, 5), THOUGHT) == THOUGHT  # no thinking at all


def test_all_thinking_of_an_answer_counts(compiler: GrammarCompiler) -> None:
    once = ids(BEGIN_MARK + " a b" + END_MARK)
    inner = len(ids(" a b")) + len(ids(END_MARK))
    wanted = [*once, *ids(" x"), *ids(BEGIN_MARK), *THOUGHT]
    output = answer(limited(compiler, inner + 2), wanted)
    assert output == [*wanted[: len(wanted) - len(THOUGHT) + 2], *ids(END_MARK), *THOUGHT[2:]]


@pytest.mark.parametrize("budget", [0, 2, 50])
def test_a_format_holds_behind_it(compiler: GrammarCompiler, budget: int) -> None:
    content: Format = {"type": "sequence", "elements": [THINKING, NUMBER]}
    output = answer(
        limited(compiler, budget, content), [*ids(BEGIN_MARK), *THOUGHT, *ids(END_MARK), *ids("123")]
    )
    text = TOKENIZER.decode(output, skip_special_tokens=False)
    thought, number = text.removeprefix(BEGIN_MARK).split(END_MARK)
    assert thought == TOKENIZER.decode(THOUGHT[:budget])
    assert number.isdigit()
    assert len(number) == 3


def test_a_character_is_not_cut(compiler: GrammarCompiler) -> None:
    """Where a format wants whole characters, the end waits for the rest of one."""
    content: Format = {"type": "sequence", "elements": [THINKING, NUMBER]}
    letters = ids("日本")
    assert len(letters) > 4, "this needs a character of several tokens"
    for budget in range(len(letters)):
        wanted = [*ids(BEGIN_MARK), *letters, *ids(END_MARK + "123")]
        output = answer(limited(compiler, budget, content), wanted)
        assert "\ufffd" not in TOKENIZER.decode(output)


def test_masks_follow_random_outputs(compiler: GrammarCompiler) -> None:
    numbers, grammar = random.Random(4), limited(compiler, 6)
    pieces = [*map(ids, (BEGIN_MARK, END_MARK, " a", "<th", "ink>", "</", "think", ">"))]
    for _ in range(30):
        wanted = [token_id for _ in range(12) for token_id in numbers.choice(pieces)]
        answer(grammar, wanted[:80])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"ends": []}, "ends"),
    ({"begins": [""]}, "begins"),
    ({"is_open": 1}, "is_open"),
    ({"content": {"type": "thinking_budget"}}, "content"),
]


@pytest.mark.parametrize(("wrong", "field"), WRONG, ids=str)
def test_what_is_no_limit(wrong: dict[str, Any], field: str) -> None:
    form = dict(thinking_budget([BEGIN_MARK], [END_MARK], 3, is_open=False, content=None))
    with pytest.raises(InvalidRequest, match=field):
        formats.to_text({**form, **wrong})
