"""Model directories, as far as tokenizers go, of every kind that the tests compare with transformers."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TOKEN = "<|im_start|>"
_TEXTS = ["hello world the quick brown fox's jumps, over a lazy dog. b", "héllo wörld 日本語 ünïcode don't"]
_SPECIAL = ["<unk>", "<s>", "</s>"]


def _byte_level(add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer, vocab_size=330, initial_alphabet=alphabet)


def _metaspace(prepend_scheme: str = "always") -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return _trained(tokenizer, trainers.BpeTrainer, vocab_size=120)


def _llama() -> tokenizers.Tokenizer:
    """As Llama 2's: no pre-tokenizer, bytes for what is not in the vocabulary."""
    bytes_first = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words = ["▁", *"ehlowrda", "▁hello", "▁world", "he", "hel"]
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *bytes_first, *words])}
    merges = [("h", "e"), ("he", "l")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def _unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer, vocab_size=90, unk_token="<unk>")


def _word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer, vocab_size=120)


def _trained(tokenizer: tokenizers.Tokenizer, trainer: Any, **settings: Any) -> tokenizers.Tokenizer:
    tokenizer.train_from_iterator(
        _TEXTS * 10, trainer(special_tokens=_SPECIAL, show_progress=False, **settings)
    )
    return tokenizer


KINDS: dict[str, Callable[..., tokenizers.Tokenizer]] = {
    "byte level": _byte_level,
    "metaspace": _metaspace,
    "llama": _llama,
    "unigram": _unigram,
    "word piece": _word_piece,
}


@functools.cache
def _tokenizer_json(kind: str, *settings: Any) -> str:
    return KINDS[kind](*settings).to_str()


@dataclass(frozen=True, slots=True)
class Directory:
    """One model's files; `added` go into tokenizer.json itself."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    special_tokens_map: dict[str, Any] | None = None
    added_tokens: dict[str, int] | None = None
    added: tuple[AddedToken, ...] = ()
    settings: tuple[Any, ...] = ()
    post_processor: Any = None
    pads: bool = False

    def write(self, path: Path) -> Path:
        """Write the files; added tokens get the ids from the first that is free."""
        backend = tokenizers.Tokenizer.from_str(_tokenizer_json(self.kind, *self.settings))
        first = backend.get_vocab_size()
        backend.add_tokens(list(self.added))
        if self.post_processor is not None:
            backend.post_processor = self.post_processor
        if self.pads:
            backend.enable_padding(pad_token="<pad>", pad_id=0)
        backend.save(str(path / "tokenizer.json"))
        config = dict(self.config)
        if "added_tokens_decoder" in config:
            decoder = enumerate(config["added_tokens_decoder"], first)
            config["added_tokens_decoder"] = {str(token_id): token for token_id, token in decoder}
        added = {text: first + offset for text, offset in (self.added_tokens or {}).items()}
        files = {
            "tokenizer_config.json": config,
            "special_tokens_map.json": self.special_tokens_map,
            "added_tokens.json": added or None,
        }
        for name, content in files.items():
            if content is not None:
                (path / name).write_text(json.dumps(content))
        return path


def token(text: str = TOKEN, **flags: bool) -> dict[str, Any]:
    """A token as an object of `added_tokens_decoder`."""
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": text, **plain, **flags}


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def directories() -> Iterator[tuple[str, Directory]]:
    """Every configuration, with a name."""
    for kind in KINDS:
        yield from ((f"{kind}: {name}", directory) for name, directory in _origins(kind))
    yield from _flags()
    yield from _contradictions()
    yield from _pre_tokenizers()
    yield from _post_processors()
    yield from _other_settings()


def _origins(kind: str) -> Iterator[tuple[str, Directory]]:
    """The same token in each of the places that a file may have it in."""
    yield "nowhere", Directory(kind, NAMED)
    yield "tokenizer.json", Directory(kind, NAMED, added=(AddedToken(TOKEN, special=True),))
    yield "added_tokens_decoder", Directory(kind, {**NAMED, "added_tokens_decoder": [token()]})
    yield "added_tokens.json", Directory(kind, NAMED, added_tokens={TOKEN: 0, "<tool>": 1})
    yield "special_tokens_map", Directory(kind, special_tokens_map={**NAMED, "eos_token": token()})
    yield "additional", Directory(kind, {**NAMED, "additional_special_tokens": [TOKEN, "<|im_end|>"]})
    yield "extra list", Directory(kind, {**NAMED, "extra_special_tokens": [TOKEN]})
    yield "extra names", Directory(kind, {**NAMED, "extra_special_tokens": {"image_token": TOKEN}})


def _flags() -> Iterator[tuple[str, Directory]]:
    for kind in ("byte level", "word piece", "metaspace"):
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            config = {**NAMED, "added_tokens_decoder": [token("B", special=False, **{flag: True})]}
            yield f"{kind}: {flag}", Directory(kind, config)


def _contradictions() -> Iterator[tuple[str, Directory]]:
    """tokenizer.json and another file differ about one token."""
    for is_special in (True, False):
        added = (AddedToken(TOKEN, special=is_special),)
        listed = [token(special=not is_special)]
        yield (
            f"decoder over special {is_special}",
            Directory("byte level", {"added_tokens_decoder": listed}, added=added),
        )
        yield (
            f"map over special {is_special}",
            Directory("byte level", special_tokens_map={"eos_token": token()}, added=added),
        )
        yield (
            f"added_tokens.json over special {is_special}",
            Directory("byte level", added_tokens={TOKEN: 0}, added=added),
        )
    named = {"eos_token": TOKEN, "added_tokens_decoder": [token(special=False)]}
    yield "a name makes special", Directory("byte level", named)
    both = {"eos_token": "<s>", "pad_token": "<s>"}
    yield "map over config", Directory("byte level", both, special_tokens_map={"eos_token": "</s>"})
    decoder = {"eos_token": "<s>", "added_tokens_decoder": [token()]}
    yield "map without effect", Directory("byte level", decoder, special_tokens_map={"eos_token": "</s>"})
    extra = {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"]}
    yield "extra over additional", Directory("byte level", extra)
    more = {"additional_special_tokens": ["<a>", TOKEN]}
    yield "additional of the map", Directory("byte level", NAMED, special_tokens_map=more)


def _pre_tokenizers() -> Iterator[tuple[str, Directory]]:
    yield "prefix space", Directory("byte level", NAMED, settings=(True,))
    yield "prefix space in the config", Directory("byte level", {**NAMED, "add_prefix_space": True})
    for scheme in ("first", "never"):
        config = {**NAMED, "legacy": False, "added_tokens_decoder": [token()]}
        yield f"metaspace {scheme}", Directory("metaspace", config, settings=(scheme,))


def _post_processors() -> Iterator[tuple[str, Directory]]:
    ids = [("<s>", 1), ("</s>", 2)]
    templates = {"bos": "<s> $A", "bos and eos": "<s> $A </s>", "eos": "$A </s>"}
    for name, single in templates.items():
        processor = processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids)
        yield f"post-processor {name}", Directory("byte level", NAMED, post_processor=processor)
    for flags in ({"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}):
        config = {**NAMED, **flags}
        yield f"{flags} without effect", Directory("llama", config, post_processor=processor)
        yield f"{flags} without processor", Directory("llama", config)


def _other_settings() -> Iterator[tuple[str, Directory]]:
    yield "clean up, BPE", Directory("byte level", {**NAMED, "clean_up_tokenization_spaces": True})
    yield "padding names a token", Directory("byte level", NAMED, pads=True)
    split = {**NAMED, "split_special_tokens": True, "added_tokens_decoder": [token()]}
    yield "split special tokens", Directory("byte level", split)
    typed = {"__type": "AddedToken", **token()}
    yield "objects with a type", Directory("metaspace", {"eos_token": typed, "image_token": "<image>"})
    yield "class", Directory("byte level", {**NAMED, "tokenizer_class": "PreTrainedTokenizerFast"})
