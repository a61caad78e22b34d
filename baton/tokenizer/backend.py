"""A model's tokenizer as the `tokenizers` library has it, with every token that the model's files name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from baton.core.errors import StartupError
from baton.tokenizer.special_tokens import add_tokens
from baton.tokenizer.text_files import read_model_text_files


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model's files say of its text."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]  # texts by name, such as `eos_token`
    chat_template: str | None
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token that ends a text by the tokenizer's own files; empty where they name none."""
        token = self.special_tokens.get("eos_token")
        token_id = self.backend.token_to_id(token) if token is not None else None
        return () if token_id is None else (token_id,)


def read_tokenizer(model_dir: Path) -> TokenizerFiles:
    """Read tokenizer.json and what lies beside it.

    Raises StartupError where tokenizer.json is missing or a file can't be read.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise StartupError(f"{path} is missing: Baton needs the model's fast tokenizer file.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise StartupError(f"{path} can't be read: {error}") from error
    files = read_model_text_files(model_dir)
    special_tokens = add_tokens(backend, files)
    backend.encode_special_tokens = bool(files.tokenizer_config.get("split_special_tokens"))
    backend.no_truncation()
    backend.no_padding()
    return TokenizerFiles(backend, special_tokens, files.chat_template, files.tokenizer_config)
