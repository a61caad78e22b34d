"""Words that an answer must not hold, as the sequences of tokens that would write them."""

from collections.abc import Sequence

from baton.core.errors import InvalidRequest
from baton.core.fields import TokenIds, TokenSequences
from baton_router.text.tokenizer import Tokenizer

MAX_WORDS = 128
MAX_LENGTH = 256  # characters


def bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> TokenSequences:
    """Each word as it begins a text and as it follows a space, as vLLM has it: a model may still spell it in
    other tokens. Raises InvalidRequest."""
    if len(words) > MAX_WORDS or any(not 0 < len(word) <= MAX_LENGTH for word in words):
        raise InvalidRequest(
            f"bad_words holds at most {MAX_WORDS} words, each of 1 to {MAX_LENGTH} characters.",
            param="bad_words",
            code="out_of_range",
        )
    return tuple(dict.fromkeys(sequence for word in words for sequence in _spellings(tokenizer, word)))


def _spellings(tokenizer: Tokenizer, word: str) -> list[TokenIds]:
    bare = word.lstrip()
    texts = (bare, f" {bare}") if bare else (word,)
    first, *spaced = [tuple(tokenizer.encode_now(text, add_special_tokens=False)) for text in texts]
    # After a space it is another word only where that changes its first token and no more.
    others = [other for other in spaced if other[:1] != first[:1] and len(other) == len(first)]
    return [sequence for sequence in (first, *others) if sequence]
