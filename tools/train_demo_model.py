"""Train the small demo model that ships with Baton, from the Python standard library's own source.

What it makes: a Llama-architecture model in Hugging Face format (weights in bfloat16), a byte-level BPE
tokenizer, a chat template and a model card. It is a model to try the system with, not one to rely on.

How: every standard-library source file is one document, `<s>text</s>`. Every documented function is also a
chat turn, `<|user|>first docstring line<|assistant|>source</s>`, so that chat answers come to an end. About
every twentieth file, chosen by a hash of its name, is held out and only measured.

Run it from the repository root (about 25 minutes on one CPU core):

    python tools/train_demo_model.py [--out baton/demo_model] [--steps N]

On one machine with the same library versions two runs give the same files, but for the time in the card.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before the import of tokenizers: its parallel counting is of no use on one core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.nn.functional as functional
import torch.utils.deterministic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20240607
TRAINING_THREADS = 2  # another number adds up in another order, and so gives another model
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
BEGIN, END, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BEGIN, END, USER, ASSISTANT]
BEGIN_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)

SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Generated tables (character maps, help topics, build variables): a tenth of the bytes, and no code to learn.
SKIPPED_TABLES = ("encodings/", "pydoc_data/", "_sysconfigdata")
HELD_OUT_ONE_IN = 20
LONGEST_CHAT_ANSWER_LINES = 40

# One line, so that it renders the same whatever trim_blocks and lstrip_blocks are. A system message becomes
# a leading comment, the one form of instruction that the training text has seen at the head of a document.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '# ' + message['content'] | replace('\\n', '\\n# ') + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

COMPLETION_PROMPT = "def __init__(self"
CHAT_PROMPT = "Return the absolute path of a file."


@dataclass(frozen=True)
class Shape:
    """The size of the model. One half as large again did no better in the same time, as it saw less text."""

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 4
    intermediate: int = 512
    heads: int = 6
    key_value_heads: int = 2
    head_dim: int = 32
    positions: int = 4096
    rope_theta: float = 10000.0
    initial_spread: float = 0.05


@dataclass(frozen=True)
class Schedule:
    """How the model is trained: many small steps over short rows, and now and then one over one long row."""

    steps: int = 3600
    short_rows: int = 4
    short_row: int = 256
    # Long rows cost more, but only they teach the model to stay sensible after a prompt of 1,000 tokens.
    long_row: int = 2048
    long_every: int = 12
    warmup_steps: int = 150
    peak_rate: float = 2.5e-3
    last_rate_fraction: float = 0.02
    weight_decay: float = 0.1
    largest_gradient: float = 1.0

    def batch_shape(self, step: int) -> tuple[int, int]:
        """Rows, and tokens in each."""
        is_long = step % self.long_every == self.long_every - 1
        return (1, self.long_row) if is_long else (self.short_rows, self.short_row)

    @property
    def tokens_seen(self) -> int:
        return sum(math.prod(self.batch_shape(step)) for step in range(self.steps))

    def rate_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a small part of the peak rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.last_rate_fraction + (1 - self.last_rate_fraction) * cosine


@dataclass(frozen=True)
class SourceFile:
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        # A hash of the name, not the position in the list: a file more or less moves no other file.
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class HeldOutLoss:
    tokens: int
    text_bytes: int
    nats_per_token: float
    nats_per_late_token: float
    bits_per_byte: float


@dataclass(frozen=True)
class Result:
    """All that the model card reports."""

    shape: Shape
    schedule: Schedule
    training_files: int
    training_bytes: int
    training_tokens: int
    chat_turns: int
    held_out_files: int
    parameters: int
    minutes: float
    loss: HeldOutLoss
    completion: str
    chat_answer: str


# --- the text -----------------------------------------------------------------------------------------


def read_standard_library() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_DIRECTORIES.intersection(relative.parts) or name.startswith(SKIPPED_TABLES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append(SourceFile(name, text))
    return found


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


# --- the tokenizer ------------------------------------------------------------------------------------


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


# --- the model ----------------------------------------------------------------------------------------


def model_config(shape: Shape) -> dict[str, Any]:
    """The content of config.json. Rotary base and data type stand under their new and their classic keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": shape.initial_spread,
        "tie_word_embeddings": True,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def new_model(shape: Shape) -> LlamaForCausalLM:
    config = {key: value for key, value in model_config(shape).items() if key not in ("dtype", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.train()
    return model


def make_optimizer(model: LlamaForCausalLM, schedule: Schedule) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    matrices = [tensor for tensor in parameters if tensor.ndim > 1]
    scales = [tensor for tensor in parameters if tensor.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.95), fused=True)


def batches(stream: torch.Tensor, schedule: Schedule) -> Iterator[torch.Tensor]:
    """Rows of one token more than the row length, from places all over the stream."""
    rows_before = 0
    for step in range(schedule.steps):
        rows, length = schedule.batch_shape(step)
        # Multiples of the golden ratio fill the stream evenly: after one pass' worth of tokens little of it
        # is unseen, where random places would leave out a third.
        places = torch.arange(rows_before, rows_before + rows, dtype=torch.float64) * GOLDEN_RATIO % 1.0
        starts = (places * (len(stream) - length)).long()
        rows_before += rows
        yield stream[starts[:, None] + torch.arange(length + 1)]


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(rows.shape[0], -1)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=120,
    )


def train(stream: torch.Tensor, shape: Shape, schedule: Schedule, console: Console) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = new_model(shape)
    optimizer = make_optimizer(model, schedule)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_factor)
    smoothed = math.log(shape.vocabulary)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=schedule.steps, loss=smoothed)
        for rows in batches(stream, schedule):
            loss = token_losses(model, rows).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.largest_gradient)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            smoothed += 0.05 * (loss.item() - smoothed)
            progress.update(task, advance=1, loss=smoothed)
    return model


# --- the shipped files --------------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, shape: Shape) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # named_parameters lists a tied tensor once, as the embedding: the file holds no copy for the output.
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes a file that only its owner may read; a shipped file is for everyone.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "config.json", model_config(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.positions,
            "chat_template": CHAT_TEMPLATE,
        },
    )


@torch.inference_mode()
def measure(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], window: int) -> HeldOutLoss:
    """The loss of every held-out token but each file's first, with at most `window` tokens of context."""
    total = late_total = 0.0
    tokens = late_tokens = 0
    for text in texts:
        document = torch.tensor(file_tokens(tokenizer, text))
        # Neighbouring windows share one token, so that the first token of the next is predicted too.
        for start in range(0, len(document) - 1, window):
            losses = token_losses(model, document[None, start : start + window + 1])[0].double()
            total += losses.sum().item()
            tokens += len(losses)
            late_total += losses[window // 2 :].sum().item()
            late_tokens += len(losses[window // 2 :])
    text_bytes = sum(len(text.encode()) for text in texts)
    return HeldOutLoss(
        tokens=tokens,
        text_bytes=text_bytes,
        nats_per_token=total / tokens,
        nats_per_late_token=late_total / max(1, late_tokens),
        bits_per_byte=total / math.log(2) / text_bytes,
    )


@torch.inference_mode()
def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, length: int) -> str:
    """The greedy continuation of a prompt that already holds its special tokens."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(  # type: ignore[misc]  # its annotation of self fits no model class
        **inputs, max_new_tokens=length, do_sample=False, pad_token_id=END_ID
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def greedy_samples(model: LlamaForCausalLM, folder: Path) -> tuple[str, str]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": CHAT_PROMPT}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return (
        complete(model, tokenizer, BEGIN + COMPLETION_PROMPT, 80),
        complete(model, tokenizer, str(chat), 120),
    )


# --- the model card -----------------------------------------------------------------------------------


def model_card(result: Result) -> str:
    sections: list[Callable[[Result], str]] = [card_head, card_data, card_training, card_measured]
    return "\n".join(section(result) for section in sections)


def card_head(result: Result) -> str:
    shape = result.shape
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
language:
- code
---

# Baton demo model

A Llama-architecture model of {result.parameters:,} parameters that continues Python source code.
**It is a model to try the system with**: it writes text that looks like Python, and that is all.
It answers no questions, and the code it writes should not be run.

{shape.layers} layers, hidden size {shape.hidden}, {shape.heads} attention heads and {shape.key_value_heads}
key-value heads of size {shape.head_dim}, a byte-level BPE vocabulary of {shape.vocabulary:,}, tied
embeddings, weights in bfloat16. The configuration allows {shape.positions:,} positions; training went
up to {result.schedule.long_row:,}.
"""


def card_data(result: Result) -> str:
    return f"""\
## Data

The source of the standard library of Python {platform.python_version()} (PSF License Version 2), and nothing
else: {result.training_files} files, {result.training_bytes:,} bytes. Left out are test directories,
`site-packages`, files that are not UTF-8, and generated tables (`encodings`, `pydoc_data`,
`_sysconfigdata*`). A further {result.held_out_files} files, chosen by a hash of their names, are held out.
Each file is one document, `<s>text</s>`.

Chat turns are made from the training files: the first docstring line of a function is the request,
the source of the function is the answer, `<|user|>request<|assistant|>answer</s>`
({result.chat_turns:,} turns). So a chat request works best when it reads like the first line of a docstring.
"""


def card_training(result: Result) -> str:
    schedule = result.schedule
    return f"""\
## Training

    python tools/train_demo_model.py --steps {schedule.steps}

{schedule.steps:,} steps, {schedule.tokens_seen:,} tokens from a stream of {result.training_tokens:,}.
A step is {schedule.short_rows} rows of {schedule.short_row} tokens; every {schedule.long_every}th is one
row of {schedule.long_row:,}. AdamW, peak rate {schedule.peak_rate}, warm-up over {schedule.warmup_steps}
steps, then a cosine; gradients clipped at {schedule.largest_gradient}. Deterministic algorithms, seed
{SEED}. It took {result.minutes:.0f} minutes with {TRAINING_THREADS} CPU threads and torch
{torch.__version__}.
"""


def card_measured(result: Result) -> str:
    loss, window = result.loss, result.schedule.long_row
    completion = textwrap.indent(COMPLETION_PROMPT + result.completion, " " * 4)
    answer = textwrap.indent(result.chat_answer, " " * 4)
    return f"""\
## Measured

On the held-out files, with the shipped bfloat16 weights (arithmetic in float32) and windows of
{window:,} tokens:

| | |
| --- | --- |
| held-out tokens | {loss.tokens:,} |
| held-out bytes | {loss.text_bytes:,} |
| loss, nats per token | {loss.nats_per_token:.3f} |
| loss beyond the first {window // 2:,} tokens of a window | {loss.nats_per_late_token:.3f} |
| bits per byte | {loss.bits_per_byte:.3f} |

Greedy completion of `{COMPLETION_PROMPT}` (80 tokens):

{completion}

Greedy answer to the chat request "{CHAT_PROMPT}":

{answer}
"""


# --- the command --------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model that ships with Baton.")
    default_folder = Path(__file__).resolve().parent.parent / "baton" / "demo_model"
    parser.add_argument("--out", type=Path, default=default_folder, help="folder for the model's files")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="default: %(default)s")
    return parser.parse_args()


def make_deterministic() -> None:
    torch.set_num_threads(TRAINING_THREADS)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory only guards against reads of it, which nothing here does, and it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def run(folder: Path, shape: Shape, schedule: Schedule, console: Console) -> Result:
    files = read_standard_library()
    training = [file for file in files if not file.held_out]
    held_out = [file for file in files if file.held_out]
    turns = [chat_turns(file.text) for file in training]
    tokenizer = train_tokenizer([file.text for file in training], shape.vocabulary)
    # From here on "<s>" in a source file is text; the markers are only ever added by their numbers.
    tokenizer.encode_special_tokens = True
    stream = training_stream(tokenizer, training, turns)
    console.print(f"{len(training)} files to learn from, {len(held_out)} held out, {len(stream):,} tokens")

    started = time.monotonic()
    trained = train(stream, shape, schedule, console)
    minutes = (time.monotonic() - started) / 60
    save(folder, trained, tokenizer, shape)

    # All that is reported comes from the files just written, so from the rounded weights.
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    completion, chat_answer = greedy_samples(shipped, folder)
    return Result(
        shape=shape,
        schedule=schedule,
        training_files=len(training),
        training_bytes=sum(len(file.text.encode()) for file in training),
        training_tokens=len(stream),
        chat_turns=sum(len(file_turns) for file_turns in turns),
        held_out_files=len(held_out),
        parameters=sum(parameter.numel() for parameter in shipped.parameters()),
        minutes=minutes,
        loss=measure(shipped, tokenizer, [file.text for file in held_out], schedule.long_row),
        completion=completion,
        chat_answer=chat_answer,
    )


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    make_deterministic()
    result = run(arguments.out, Shape(), Schedule(steps=arguments.steps), console)
    (arguments.out / "README.md").write_text(model_card(result), encoding="utf-8")
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    loss = result.loss
    console.print(f"{size:,} bytes, {result.parameters:,} parameters, {result.minutes:.1f} minutes")
    console.print(f"held-out: {loss.nats_per_token:.3f} nats/token, {loss.bits_per_byte:.3f} bits/byte")


if __name__ == "__main__":
    main()
