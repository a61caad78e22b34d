"""Turns token ids into text as they come, never emitting half a character.

Decoders that work on bytes (ByteLevel; ByteFallback as in Llama 2 and Gemma) are followed exactly: a token is
a few bytes, and an incremental UTF-8 decoder holds back at most three of them. One token costs a list look-up
and never a second look at earlier tokens. `tokenizers.decoders.DecodeStream` is not used: it has no flush,
and on a run of bytes that never becomes a character it emits nothing and decodes all of it again each step.
Every other decoder goes through `WindowDetokenizer`, which decodes a short window of tokens.
"""

import codecs
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS = 16
_MAX_CONTEXT_TOKENS = 8  # of what a text goes on from


class Detokenizer(Protocol):
    """The text of one choice."""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often empty."""
        ...

    def bytes_of(self, token_id: int) -> bytes:
        """What this token would add to the text if it came next; a character may be spread over several."""
        ...

    def flush(self) -> str:
        """What is still held back, when no token follows."""
        ...


@dataclass(frozen=True, slots=True)
class ByteRules:
    """How a tokenizer turns the text of a token into bytes."""

    is_byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    strip_content: str = ""
    strip_count: int = 0  # how many `strip_content` are dropped from the start of the text

    def token_bytes(self, content: str) -> bytes:
        """The bytes of one token of the vocabulary."""
        if self.is_byte_level:
            return _byte_level_bytes(content)
        for pattern, replacement in self.replacements:
            content = content.replace(pattern, replacement)
        if is_byte_token(content):
            return raw_byte(content)
        return content.encode("utf-8", "replace")


def byte_rules(decoder: Mapping[str, Any] | None) -> ByteRules | None:
    """The rules that the `decoder` of a tokenizer.json stands for; None if it does not work on bytes."""
    steps: Sequence[Mapping[str, Any]] = (decoder or {}).get("decoders") or [decoder or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteRules(is_byte_level=True)
    num_replaces = kinds.index("ByteFallback") if "ByteFallback" in kinds else 0
    if kinds[num_replaces:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    if any(
        kind != "Replace" or "String" not in step["pattern"]
        for kind, step in zip(kinds, steps[:num_replaces], strict=False)
    ):
        return None
    strip: Mapping[str, Any] = steps[-1] if kinds[-1] == "Strip" else {"content": "", "start": 0, "stop": 0}
    if strip["stop"]:
        return None
    replacements = tuple((step["pattern"]["String"], step["content"]) for step in steps[:num_replaces])
    return ByteRules(False, replacements, strip["content"], strip["start"])


class ByteDetokenizer:
    """Text of tokens whose bytes are known.

    Bytes that are no UTF-8 become one U+FFFD per maximal invalid part, as in the Unicode standard. (The
    ByteFallback of `tokenizers` would throw away the whole run of byte tokens around them instead.)
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], rules: ByteRules, after: Sequence[int] = ()
    ) -> None:
        """`token_bytes` gives b"" for tokens that are not part of the text.

        `after` are the tokens that the text goes on from: what is stripped is the start of the whole.
        """
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_content = rules.strip_content
        self._num_to_strip = rules.strip_count
        if self._num_to_strip and any(token_bytes(token_id) for token_id in after):
            self._num_to_strip = 0

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        text = self._decoder.decode(self._token_bytes(token_id))
        return self._strip(text) if self._num_to_strip else text

    def bytes_of(self, token_id: int) -> bytes:
        """See Detokenizer."""
        token_bytes = self._token_bytes(token_id)
        strip = self._strip_content.encode()
        for _ in range(self._num_to_strip):
            token_bytes = token_bytes.removeprefix(strip)
        return token_bytes

    def flush(self) -> str:
        """See Detokenizer."""
        text = self._decoder.decode(b"", final=True)
        return self._strip(text) if self._num_to_strip else text

    def _strip(self, text: str) -> str:
        while text and self._num_to_strip:
            if not text.startswith(self._strip_content):
                self._num_to_strip = 0
                break
            text = text[len(self._strip_content) :]
            self._num_to_strip -= 1
        return text


class WindowDetokenizer:
    """Text of tokens whose decoder looks at neighbours: decodes the tokens of the last two increments.

    The first of the two gives the decoder its context; what the window's text has more than the first's is
    new. Holds back at most 16 tokens, and only while their text ends in U+FFFD.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_text: Callable[[int], bool],
        raw_byte: Callable[[int], bytes | None],
        after: Sequence[int] = (),
    ) -> None:
        """`is_text` is False for tokens that are no part of the text: they must not become context.

        `raw_byte` gives the byte that a token stands for, None for tokens of text; `after` are the tokens
        that the text goes on from, its first context.
        """
        self._decode = decode
        self._is_text = is_text
        self._raw_byte = raw_byte
        self._context = [token_id for token_id in after[-_MAX_CONTEXT_TOKENS:] if is_text(token_id)]
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if not self._is_text(token_id):
            return ""
        self._held.append(token_id)
        text = self._held_text()
        if not text or (text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS):
            return ""
        self._context, self._held = self._held, []
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """See Detokenizer. Of a raw byte the decoder itself shows nothing before the character is whole."""
        if not self._is_text(token_id):
            return b""
        raw_byte = self._raw_byte(token_id)
        if raw_byte is not None:
            return raw_byte
        before = [*self._context, *self._held]
        return self._decode([*before, token_id])[len(self._decode(before)) :].encode()

    def flush(self) -> str:
        """See Detokenizer."""
        text = self._held_text()
        self._context, self._held = self._held, []
        return text

    def _held_text(self) -> str:
        context_text = self._decode(self._context)
        return self._decode(self._context + self._held)[len(context_text) :]


class UnspacedDetokenizer:
    """Another one, without the spaces that its decoder puts between added tokens that follow each other."""

    def __init__(self, detokenizer: Detokenizer, added: Mapping[int, str]) -> None:
        """`added` are the tokenizer's added tokens, as they are written."""
        self._detokenizer = detokenizer
        self._added = added
        self._follows_added = False

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        text = self._detokenizer.push(token_id)
        is_added, follows_added = token_id in self._added, self._follows_added
        self._follows_added = is_added
        return self._added[token_id] if is_added and follows_added and text else text

    def bytes_of(self, token_id: int) -> bytes:
        """See Detokenizer."""
        if self._follows_added and token_id in self._added:
            return self._added[token_id].encode()
        return self._detokenizer.bytes_of(token_id)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._detokenizer.flush()


def decoder_of(tokenizer_json: str) -> Mapping[str, Any] | None:
    """The `decoder` section of a tokenizer.json."""
    decoder: Mapping[str, Any] | None = json.loads(tokenizer_json).get("decoder")
    return decoder


def is_byte_token(content: str) -> bool:
    """Whether a token's text is that of a raw byte, such as <0xE2>."""
    if len(content) != 6 or not content.startswith("<0x") or not content.endswith(">"):
        return False
    return all(digit in "0123456789abcdefABCDEF" for digit in content[3:5])


def raw_byte(content: str) -> bytes:
    """The byte that such a token stands for."""
    return bytes((int(content[3:5], 16),))


def _byte_level_bytes(content: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in content)
    except KeyError:  # an added token, written as it is
        return content.encode("utf-8", "replace")


@functools.cache
def _byte_of_character() -> Mapping[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for 256, 257 and so on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if byte not in printable)
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
