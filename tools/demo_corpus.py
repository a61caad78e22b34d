"""The demo model's text: the standard library's source as documents and chat turns, and its tokenizer."""

import ast
import hashlib
import os
import sysconfig
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

# Set before the import of tokenizers: its parallel counting is of no use on so few cores.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEED = 20240607
BEGIN, END, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BEGIN, END, USER, ASSISTANT]
BEGIN_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)

SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Generated tables (character maps, help topics, build variables): a tenth of the bytes, and no code to learn.
SKIPPED_TABLES = ("encodings/", "pydoc_data/", "_sysconfigdata")
HELD_OUT_ONE_IN = 20
LONGEST_CHAT_ANSWER_LINES = 40


@dataclass(frozen=True)
class SourceFile:
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        # A hash of the name, not the position in the list: a file more or less moves no other file.
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def read_standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_DIRECTORIES.intersection(relative.parts) or name.startswith(SKIPPED_TABLES):
            continue
        content = path.read_bytes()
        if content.strip() and is_utf8(content):
            # As text mode reads it, whatever the file's line ends.
            text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
            found.append(SourceFile(name, text))
    return found


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def chat_turns(text: str) -> list[tuple[str, str]]:
    """(request, answer) pairs: the first docstring line of a function, and the function's source."""
    with warnings.catch_warnings():
        # Old-style escapes in library strings are not this script's concern.
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    lines = text.splitlines()
    turns = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
            continue
        docstring = ast.get_docstring(node)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        if docstring and node.end_lineno - first <= LONGEST_CHAT_ANSWER_LINES:
            source = textwrap.dedent("\n".join(lines[first : node.end_lineno]))
            turns.append((docstring.strip().splitlines()[0], source))
    return turns


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def file_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return [BEGIN_ID, *tokenizer.encode(text, add_special_tokens=False).ids, END_ID]


def chat_tokens(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """All turns of one file as one conversation, in the form in which the chat template renders it."""
    tokens = [BEGIN_ID]
    for request, answer in turns:
        tokens += [USER_ID, *tokenizer.encode(request, add_special_tokens=False).ids]
        tokens += [ASSISTANT_ID, *tokenizer.encode(answer, add_special_tokens=False).ids, END_ID]
    return tokens


def training_stream(
    tokenizer: Tokenizer, files: list[SourceFile], turns: list[list[tuple[str, str]]]
) -> torch.Tensor:
    documents = [file_tokens(tokenizer, file.text) for file in files]
    documents += [chat_tokens(tokenizer, file_turns) for file_turns in turns if file_turns]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED)).tolist()
    return torch.tensor([token for index in order for token in documents[index]])
