"""The demo model's card: what it is, what it was made of, and what was measured."""

import platform
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from demo_corpus import SEED
from demo_training import TRAINING_THREADS, HeldOutLoss, Schedule, Shape

COMPLETION_PROMPT = "def __init__(self"
CHAT_PROMPT = "Return the absolute path of a file."


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
