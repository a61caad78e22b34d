"""Tokens that the files beside tokenizer.json name, merged as transformers' fast tokenizers merge them.

Chat templates write these tokens, and a model that was fine-tuned by transformers knows them by one id each;
tokenizer.json alone may not have them. The rules are those of `PreTrainedTokenizerBase._from_pretrained` and
`TokenizersBackend.__init__`: with an `added_tokens_decoder` in tokenizer_config.json the two older files do
not count; without it special_tokens_map.json wins over tokenizer_config.json. A token that is new takes the
next free id, in the order of the ids that the files give.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from baton.core.errors import StartupError
from baton.tokenizer.text_files import ModelTextFiles

logger = logging.getLogger(__name__)

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def add_tokens(backend: tokenizers.Tokenizer, files: ModelTextFiles) -> dict[str, str]:
    """Give the backend every token that the files name; returns the texts of those that have a name, such as
    `bos_token`.

    Raises StartupError where the files are not of the form that transformers writes.
    """
    try:
        listed = _listed(backend, files)
        named, extra = _named_and_extra(backend, files)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise StartupError(f"The special tokens of the model's files can't be read: {error!r}") from error
    present = backend.get_added_tokens_decoder().values()
    special = {token.content for token in (*present, *named.values()) if token.special}
    for token in listed.values():  # the library goes on to skip what was special once, whatever the flag says
        token.special = token.special or token.content in special
    contents = {token.content for token in (*present, *listed.values())}
    in_order = [token for _, token in sorted(listed.items())]
    backend.add_tokens([*in_order, *_new((*named.values(), *extra), contents)])
    _warn_of_other_ids(backend, listed)
    return {name: token.content for name, token in named.items()}


def _warn_of_other_ids(backend: tokenizers.Tokenizer, listed: Mapping[int, AddedToken]) -> None:
    """Say where tokens have other ids than a file gives them: tokenizer.json's count, as in transformers."""
    for token_id, token in listed.items():
        actual = backend.token_to_id(token.content)
        if actual != token_id:
            logger.warning("the files give %r the id %d, but it has %s", token.content, token_id, actual)


def _new(tokens: Iterable[AddedToken], contents: set[str]) -> list[AddedToken]:
    """Those whose text is not among `contents`, each once."""
    return list({token.content: token for token in tokens if token.content not in contents}.values())


def _listed(backend: tokenizers.Tokenizer, files: ModelTextFiles) -> dict[int, AddedToken]:
    """The tokens that the files give with an id."""
    declared = files.tokenizer_config.get("added_tokens_decoder")
    if declared is not None:
        return {int(token_id): _token(token, special=False) for token_id, token in declared.items()}
    named, extra = _named_and_extra(backend, files)
    special = {token.content for token in (*named.values(), *extra)}
    listed = {
        token_id: AddedToken(text, normalized=text not in special, special=text in special)
        for text, token_id in files.added_tokens.items()
    }
    return listed | backend.get_added_tokens_decoder()


def _named_and_extra(
    backend: tokenizers.Tokenizer, files: ModelTextFiles
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens that have a name, and those that have none."""
    config = files.tokenizer_config
    sources = [config] if "added_tokens_decoder" in config else [config, files.special_tokens_map]
    padding = backend.padding
    written: dict[str, Any] = {"pad_token": padding["pad_token"]} if padding else {}
    extra: list[AddedToken] = []
    for source in sources:
        written |= {name: value for name, value in source.items() if name.endswith("_token")}
        more = source.get("extra_special_tokens") or []
        if isinstance(more, dict):
            written |= more
            more = []
        extra += [_token(value) for value in more or source.get("additional_special_tokens") or []]
    named = {name: _token(value) for name, value in written.items() if isinstance(value, str | dict)}
    for token in named.values():
        token.special = True
    return named, extra


def _token(value: Any, *, special: bool = True) -> AddedToken:
    """A token that a file writes as a string or as an object."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {name: value[name] for name in _FLAGS if name in value}
    return AddedToken(value["content"], **({"special": special} | flags))
