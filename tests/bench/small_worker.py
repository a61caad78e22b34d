"""A server of `bench.gpu_worker` with a small model on the CPU: `python -m tests.bench.small_worker ...`."""

import dataclasses
import sys

import torch

from baton.rpc import lifecycle
from bench.gpu_model import LLAMA_8B
from bench.gpu_worker import load, serve, worker_config

SMALL = dataclasses.replace(
    LLAMA_8B, vocab_size=1000, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, windows=(None, None),
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    _, role, address, transport = sys.argv
    made = load(role, SMALL, torch.device("cpu"))
    lifecycle.run(serve(worker_config(role, address, transport), made))
