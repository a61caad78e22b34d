"""Train the small demo model that ships with Baton, from the Python standard library's own source.

What it makes: a Llama-architecture model in Hugging Face format (weights in bfloat16), a byte-level BPE
tokenizer, a chat template and a model card. It is a model to try the system with, not one to rely on.

How: every standard-library source file is one document, `<s>text</s>`. Every documented function is also a
chat turn, `<|user|>first docstring line<|assistant|>source</s>`, so that chat answers come to an end. About
every twentieth file, chosen by a hash of its name, is held out and only measured.

Run it from the repository root (about 40 minutes on two CPU cores):

    python tools/train_demo_model.py [--out baton/demo_model] [--steps N]

On one machine with the same library versions two runs give the same files, but for the time in the card.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic
from demo_corpus import (
    BEGIN,
    BEGIN_ID,
    END,
    END_ID,
    chat_turns,
    read_standard_library,
    train_tokenizer,
    training_stream,
)
from demo_model_card import CHAT_PROMPT, COMPLETION_PROMPT, Result, model_card
from demo_training import TRAINING_THREADS, Schedule, Shape, measure, model_config, train
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
