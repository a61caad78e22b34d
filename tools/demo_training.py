"""How the demo model is made from tokens: its shape, the schedule, the loop, the loss on held-out text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from demo_corpus import BEGIN_ID, END_ID, SEED, file_tokens
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

TRAINING_THREADS = 2  # another number adds up in another order, and so gives another model
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


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

    steps: int = 8000
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
class HeldOutLoss:
    tokens: int
    text_bytes: int
    nats_per_token: float
    nats_per_late_token: float
    bits_per_byte: float


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
