"""The model's tokenizer, read from its files with the `tokenizers` library alone."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from baton.core.errors import InvalidRequest, StartupError
from baton.tokenizer.backend import TokenizerFiles, read_tokenizer
from baton_router.text.chat_template import ChatTemplate
from baton_router.text.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    UnspacedDetokenizer,
    WindowDetokenizer,
    byte_rules,
    decoder_of,
    is_byte_token,
    raw_byte,
)

# Up to so many characters an encode takes a few milliseconds; a thread's round trip costs one itself.
_MAX_CHARACTERS_ON_LOOP = 8192
_KEPT_TEMPLATES = 16  # of requests, compiled
_MAX_TEMPLATE_LENGTH = 64 * 1024  # characters; most models' own have a tenth of that
_MAX_TOKENS_ON_LOOP = 8192  # decoded in about a millisecond
_CHARACTERS_A_SLICE = 65_536
_CHARACTERS_A_TOKEN = 8  # more than texts have on average


class Tokenizer:
    """Text to token ids and back. Safe to share between requests and threads."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises StartupError if the chat template is broken."""
        backend = files.backend
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = files.eos_token_ids
        self._info = {**files.config, **files.special_tokens, "chat_template": files.chat_template}
        template, special_tokens = files.chat_template, files.special_tokens
        self.chat_template_source = template
        self._chat_template = ChatTemplate(template, special_tokens) if template is not None else None
        self._request_template = lru_cache(_KEPT_TEMPLATES)(
            lambda source: _of_a_request(source, special_tokens)
        )
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self.special_texts = frozenset(self._special.values())
        self._rules = byte_rules(decoder_of(backend.to_str()))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Read tokenizer.json and what lies beside it.

        Raises StartupError where tokenizer.json is missing or a file can't be read.
        """
        return cls(read_tokenizer(model_dir))

    async def encode(self, text: str, *, max_tokens: int, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; long texts are encoded on a thread, so that the event loop goes on.

        Raises InvalidRequest as `encode_now` does, and for a long text of more than twice `max_tokens`.
        """
        if len(text) <= _MAX_CHARACTERS_ON_LOOP:
            return self.encode_now(text, add_special_tokens=add_special_tokens)
        if len(text) > _CHARACTERS_A_TOKEN * max_tokens:
            await asyncio.to_thread(self._require_few_tokens, text, max_tokens)
        return await asyncio.to_thread(self.encode_now, text, add_special_tokens=add_special_tokens)

    def encode_now(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, computed on the calling thread.

        The batch call is the one that releases the GIL while it works; `encode` holds it. Raises
        InvalidRequest where the text holds half a surrogate pair, which JSON can write and UTF-8 can't.
        """
        check_unicode("prompt", text)
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def _require_few_tokens(self, text: str, max_tokens: int) -> None:
        """Raises InvalidRequest if the text has more than twice `max_tokens`, encoding no more to find out.

        `tokenizers` takes about 250 bytes for each token of a text: gigabytes for what one request may hold.
        Slices may have a few tokens more than the whole has; hence twice.
        """
        check_unicode("prompt", text)
        num_tokens = 0
        for start in range(0, len(text), _CHARACTERS_A_SLICE):
            part = text[start : start + _CHARACTERS_A_SLICE]
            num_tokens += len(self.encode_now(part, add_special_tokens=False))
            if num_tokens > 2 * max_tokens:
                raise InvalidRequest(
                    f"The prompt's {len(text)} characters are more than {2 * max_tokens} tokens, and at most "
                    f"{max_tokens} are allowed.",
                    param="prompt",
                    code="context_length_exceeded",
                )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids without a token are left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    async def decode_many(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; many are decoded on a thread, as `encode` does."""
        if len(token_ids) <= _MAX_TOKENS_ON_LOOP:
            return self.decode(token_ids, skip_special_tokens=False)
        decode = self._backend.decode_batch  # which releases the GIL
        [text] = await asyncio.to_thread(decode, [list(token_ids)], skip_special_tokens=False)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        template: str | None = None,
    ) -> str:
        """The prompt of a conversation, by a template of the request or the model's.

        Raises InvalidRequest if there is none, it is broken, or it refuses.
        """
        chat_template = self._chat_template if template is None else self._request_template(template)
        if chat_template is None:
            raise InvalidRequest(
                "This model has no chat template: use completions with a prompt instead.",
                param="messages",
                code="no_chat_template",
            )
        return chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
            continue_final_message=continue_final_message,
        )

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        after: Sequence[int] = (),
    ) -> Detokenizer:
        """A new incremental decoder, for one choice, of a text that goes on from the tokens `after`.

        Without `spaces_between_special_tokens` added tokens, shown one after the other, are written without
        the spaces that some decoders put between them.
        """
        found = self._detokenizer(self._special if skip_special_tokens else {}, after)
        if skip_special_tokens or spaces_between_special_tokens or self._rules is not None:
            return found
        return UnspacedDetokenizer(found, self._added)

    def _detokenizer(self, skipped: Mapping[int, str], after: Sequence[int]) -> Detokenizer:
        if self._rules is not None:
            return ByteDetokenizer(lambda i: b"" if i in skipped else self.token_bytes(i), self._rules, after)
        return WindowDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens=False),
            lambda i: i not in skipped and self._backend.id_to_token(i) is not None,
            self._raw_byte,
            after,
        )

    def info(self) -> dict[str, Any]:
        """What tokenizer_config.json says, with the special tokens and the template that are in use."""
        return dict(self._info)

    def special_text(self, token_id: int) -> str | None:
        """How a special token is written; None for every other token."""
        return self._special.get(token_id)

    def token_name(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty if there is none of this id."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token for itself; what it adds to a text, a detokenizer knows."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def _compute_bytes(self, token_id: int) -> bytes:
        if self._rules is None:
            return self._raw_byte(token_id) or self.decode([token_id], skip_special_tokens=False).encode()
        return self._rules.token_bytes(self.token_name(token_id))

    def _raw_byte(self, token_id: int) -> bytes | None:
        """The byte of a token such as <0xE2>, where the decoder takes it for one."""
        name = self.token_name(token_id)
        is_one = is_byte_token(name) and self.decode([token_id], skip_special_tokens=False) != name
        return raw_byte(name) if is_one else None


def check_unicode(name: str, text: str) -> None:
    """Raises InvalidRequest if the field `name` can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds half a surrogate pair at character {error.start}.",
            param=name,
        ) from error


def _of_a_request(source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """Raises InvalidRequest where the template is too long or broken."""
    if len(source) > _MAX_TEMPLATE_LENGTH:
        raise InvalidRequest(
            f"chat_template has at most {_MAX_TEMPLATE_LENGTH} characters.",
            param="chat_template",
            code="out_of_range",
        )
    try:
        return ChatTemplate(source, special_tokens, whose="The request's")
    except StartupError as error:
        raise InvalidRequest(str(error), param="chat_template", code="chat_template_error") from error
