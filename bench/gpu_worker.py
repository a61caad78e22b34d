"""A prefill or a decode server on a GPU with random weights of Llama 8B's shape, for `bench.gpu_transfers`:

    python -m bench.gpu_worker prefill unix:/tmp/prefill.sock cuda_ipc

The services are those of `baton prefill` and `baton decode`; only the model comes from no file.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from baton import worker_process
from baton.config import EngineConfig, Role, WorkerConfig
from baton.core.page_ports import PageStore
from baton.core.ports import Runner
from baton.engine.models.decoder import DecoderConfig
from baton.grammars.compiler import GrammarCompiler
from baton.rpc import lifecycle
from baton_decode_service.service import DecodeService
from baton_launch.logging_setup import set_up_logging
from baton_prefill_service.service import PrefillService
from bench.gpu_model import BLOCK_SIZE, LLAMA_8B, random_decoder, runner_for

NUM_BLOCKS = 4 * 4096 // BLOCK_SIZE + 64  # four prompts that no cache shares
CHUNK_TOKENS = 512
NOWHERE = Path("/nowhere")


@dataclass(frozen=True)
class RandomEngine:
    """Implements baton.core.ports.LoadedEngine."""

    runner: Runner
    page_store: PageStore
    max_model_len: int
    vocab_size: int
    fingerprint: bytes
    grammars: GrammarCompiler


def load(role: str, config: DecoderConfig, device: torch.device) -> RandomEngine:
    """Decode has a graph for one row."""
    decoder = random_decoder(config, device)
    batch_sizes = (1,) if role == "decode" and device.type == "cuda" else ()
    made = runner_for(decoder, device, num_blocks=NUM_BLOCKS, batch_sizes=batch_sizes)
    grammars = GrammarCompiler(NOWHERE, config.vocab_size, ())
    return RandomEngine(
        made.runner, made.cache, config.max_position_embeddings, config.vocab_size, bytes(32), grammars
    )


def worker_config(role: str, address: str, transport: str) -> WorkerConfig:
    """As the options of `baton prefill` would spell it."""
    engine = EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=4, max_num_batched_tokens=CHUNK_TOKENS)
    token = os.environ.get("BATON_CLUSTER_TOKEN", "")
    return WorkerConfig(
        cast(Role, role), NOWHERE, address, address, role, token, engine, kv_transport=transport
    )


async def serve(config: WorkerConfig, loaded: RandomEngine) -> None:
    """What `baton prefill` or `baton decode` runs, with this engine."""
    await worker_process.serve(config, loaded, PrefillService if config.role == "prefill" else DecodeService)


if __name__ == "__main__":
    set_up_logging()
    _, role, address, transport = sys.argv
    made = load(role, LLAMA_8B, torch.device("cuda", 0))
    lifecycle.run(serve(worker_config(role, address, transport), made))
