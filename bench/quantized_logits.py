"""How near the logits with 8-bit weights come to those in bfloat16, on a CPU: cosines over a text's tokens.

    python -m bench.quantized_logits baton/demo_model [--tokens 1024] [--save NAME]

The text is source of Python's own library, which the shipped model was made for.
"""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.core.plan import ScheduledRow, StepPlan
from baton.engine.attention.registry import attention_backend
from baton.engine.inputs import build_inputs
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.models.decoder import Decoder
from baton.engine.models.registry import decoder_config
from baton.engine.pages.kv_cache import KVCache
from baton.engine.weights import load_weights
from baton.model_files import read_config
from bench.report import print_table, save

BLOCK_SIZE = 16
CPU = torch.device("cpu")


def logits_of(decoder: Decoder, device: torch.device, token_ids: Sequence[int]) -> Tensor:
    """float64 `[T, V]` after each token of one prompt."""
    config = decoder.config
    layout = KVLayout(BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim, "bfloat16")
    num_blocks = layout.blocks_for(len(token_ids))
    cache = KVCache(layout, num_blocks, device)
    plan = StepPlan((ScheduledRow(list(token_ids), 0, list(range(num_blocks)), ()),))
    with torch.inference_mode():
        inputs = build_inputs(plan, BLOCK_SIZE, cache.padding_block, device)
        step = attention_backend(cache.pool, config.windows).begin_step(inputs.attention)
        return decoder.logits(decoder.forward(inputs.token_ids, inputs.positions, step)).double()


def loaded(model_dir: Path, quantization: str) -> Decoder:
    """The model in bfloat16 with such weights. Raises StartupError."""
    placement = ParameterPlacement(torch.bfloat16, CPU, quantization)
    decoder = Decoder(decoder_config(read_config(model_dir)), placement)
    load_weights(model_dir, decoder.checkpoint_tensors())
    decoder.pack()
    return decoder


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model's directory")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--save", metavar="NAME", help="bench/results/DATE-quantized-logits-NAME.json")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    token_ids = tokenizer.encode(inspect.getsource(argparse)).ids[: arguments.tokens]
    exact, rounded = (logits_of(loaded(arguments.model, name), CPU, token_ids) for name in ("none", "int8"))
    cosines = torch.cosine_similarity(exact, rounded, dim=-1)
    row = {
        "model": arguments.model.name,
        "tokens": len(token_ids),
        "mean cosine": round(float(cosines.mean()), 5),
        "least cosine": round(float(cosines.min()), 5),
    }
    print_table("Logits with int8 weights beside bfloat16's", [row])
    if arguments.save:
        print(save(f"quantized-logits-{arguments.save}", [row]))


if __name__ == "__main__":
    main()
