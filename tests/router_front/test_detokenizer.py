"""Increments joined together are the full decode, for every kind of decoder."""

import codecs

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from baton.tokenizer.backend import TokenizerFiles
from baton_router.text.detokenizer import ByteDetokenizer, WindowDetokenizer
from baton_router.text.tokenizer import Tokenizer


def increments(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_increments_are_the_full_decode(tokenizer: Tokenizer, data: st.DataObject, skip: bool):
    # A few ids beyond the vocabulary: models pad theirs.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    pieces = increments(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_text_survives_and_no_half_character_leaves(tokenizer: Tokenizer, text: str):
    pieces = increments(tokenizer, tokenizer.encode_now(text), skip_special_tokens=False)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_emoji_over_several_tokens_comes_whole(tokenizer: Tokenizer):
    ids = tokenizer.encode_now("🎉")
    assert len(ids) > 1
    assert [piece for piece in increments(tokenizer, ids) if piece] == ["🎉"]


def test_endless_continuation_bytes_are_not_held(tokenizer: Tokenizer):
    continuation = tokenizer.encode_now("🎉")[1:]
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in continuation * 1000]
    assert len("".join(pieces)) > 900


def byte_fallback_tokenizer(*, strip: bool) -> Tokenizer:
    """As Llama 2's (with Strip) and Gemma's (without)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for word in ("▁", "▁hello", "hello", "world", "▁wörld", "é", "日", "▁▁▁", "a"):
        vocab[word] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return Tokenizer(TokenizerFiles(backend, {"eos_token": "</s>"}, None))


LLAMA, GEMMA = byte_fallback_tokenizer(strip=True), byte_fallback_tokenizer(strip=False)


@pytest.mark.parametrize("fallback", [LLAMA, GEMMA])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_byte_fallback_increments_are_the_full_decode(fallback: Tokenizer, data: st.DataObject):
    # Whole characters as runs of bytes; runs that are no UTF-8 are the next test's.
    runs = [[3 + byte for byte in text.encode()] for text in ("é", "日", "🎉", " ", "x")]
    others = [[token_id] for token_id in (0, 1, 2, *range(259, fallback.vocab_size + 2))]
    parts = data.draw(st.lists(st.sampled_from(runs + others), max_size=30))
    ids = [token_id for part in parts for token_id in part]
    assert isinstance(fallback.detokenizer(), ByteDetokenizer)
    assert "".join(increments(fallback, ids)) == fallback.decode(ids)


@given(ids=st.lists(st.integers(3, 258), max_size=30))
def test_byte_fallback_keeps_what_is_valid_of_a_broken_run(ids: list[int]):
    expected = codecs.decode(bytes(token_id - 3 for token_id in ids), "utf-8", "replace")
    assert "".join(increments(GEMMA, ids)) == expected


def window_tokenizer(decoder: decoders.Decoder) -> Tokenizer:
    words = ["<unk>", "</s>", "▁hello", "▁world", "hello", "▁", "日", "##ing", "\ufffd", "x"]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "</s>")])
    return Tokenizer(TokenizerFiles(backend, {"eos_token": "</s>"}, None))


@pytest.mark.parametrize(
    "window",
    [window_tokenizer(decoders.Metaspace()), window_tokenizer(decoders.WordPiece(cleanup=False))],
    ids=["metaspace", "wordpiece"],
)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_window_increments_are_the_full_decode(window: Tokenizer, data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, window.vocab_size + 1), max_size=60))
    assert isinstance(window.detokenizer(), WindowDetokenizer)
    assert "".join(increments(window, ids)) == window.decode(ids)


@pytest.mark.parametrize(
    ("kind", "prompt", "token", "expected"),
    [
        (LLAMA, ["<s>", "▁hello"], "▁wörld", " wörld"),
        (LLAMA, ["<s>"], "▁hello", "hello"),  # nothing of the text was before
        (LLAMA, [], "▁hello", "hello"),
        (GEMMA, ["▁hello"], "▁wörld", " wörld"),
        (window_tokenizer(decoders.Metaspace()), ["▁hello", "</s>"], "▁world", " world"),
        (window_tokenizer(decoders.Metaspace()), ["</s>"], "▁world", "world"),
        (window_tokenizer(decoders.WordPiece(cleanup=False)), ["▁hello"], "##ing", "ing"),
        (window_tokenizer(decoders.WordPiece(cleanup=False)), ["▁hello"], "x", " x"),
    ],
)
def test_text_goes_on_from_the_prompt(kind: Tokenizer, prompt: list[str], token: str, expected: str):
    """What a decoder drops at the start of a text is part of one that goes on."""
    ids = {kind.token_name(index): index for index in range(kind.vocab_size)}
    detokenizer = kind.detokenizer(after=[ids[name] for name in prompt])
    assert detokenizer.push(ids[token]) + detokenizer.flush() == expected


def test_window_holds_at_most_sixteen_tokens():
    window = window_tokenizer(decoders.Metaspace())
    detokenizer = window.detokenizer()
    assert "".join(detokenizer.push(8) for _ in range(16)) == "\ufffd" * 16
