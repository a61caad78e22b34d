"""Models of random weights made on the device, and steps of them by hand, for `bench.gpu_parts`."""

from typing import Any

import torch

from baton.core.kv_layout import KVLayout
from baton.core.plan import SampleTask, ScheduledRow, StepPlan, StepResult
from baton.core.sampling import SamplingParams
from baton.engine.attention.registry import attention_backend
from baton.engine.gpu.graphs import CudaRecorder, DecodeGraphs, GraphInputs, GraphShape
from baton.engine.gpu.runner import GpuRunner
from baton.engine.gpu.token_feed import TokenFeed
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.layers.rope import RopeConfig
from baton.engine.models.decoder import Decoder, DecoderConfig
from baton.engine.pages.kv_cache import KVCache

BLOCK_SIZE = 16
MAX_LEN = 8192
MAX_NUM_SEQS = 64

LLAMA_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    activation="silu",
    rope=RopeConfig("default", 500_000.0, 1.0, MAX_LEN),
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied_embeddings=False,
    windows=(None,) * 32,
    max_position_embeddings=MAX_LEN,
)


class BenchRunner:
    """A runner and the pages that it works on."""

    def __init__(self, runner: GpuRunner, cache: KVCache) -> None:
        self.runner = runner
        self.cache = cache

    def run(self, plan: StepPlan) -> StepResult:
        """One step."""
        return self.runner.submit(plan).collect()


def random_decoder(
    config: DecoderConfig, device: torch.device, std: float = 0.02, quantization: str = "none"
) -> Decoder:
    """bfloat16, normal weights; of the default deviation small enough that nothing overflows."""
    decoder = Decoder(config, ParameterPlacement(torch.bfloat16, device, quantization))
    torch.manual_seed(0)
    for name, tensor in decoder.checkpoint_tensors().items():
        tensor.normal_(std=std)
        if "norm" in name:
            tensor.add_(1.0)
    return decoder


def runner_for(
    decoder: Decoder,
    device: torch.device,
    *,
    num_blocks: int = 0,
    cache: KVCache | None = None,
    batch_sizes: tuple[int, ...],
) -> BenchRunner:
    """With graphs of these batch sizes, or eager if there are none; pages are new unless `cache` is given."""
    config = decoder.config
    layout = KVLayout(BLOCK_SIZE, config.num_layers, config.num_kv_heads, config.head_dim, "bfloat16")
    if cache is None:
        cache = KVCache(layout, num_blocks, device)
        cache.pool.normal_()  # zeros can be computed with faster than what a model writes
    attention = attention_backend(cache.pool, config.windows)
    feed = TokenFeed(MAX_NUM_SEQS, device)
    graphs = None
    if batch_sizes:
        shape = GraphShape(batch_sizes[-1], MAX_LEN // BLOCK_SIZE, BLOCK_SIZE, cache.padding_block)
        graphs = DecodeGraphs(decoder, attention, feed, GraphInputs(shape, device), batch_sizes, MAX_LEN)
        graphs.capture(CudaRecorder(), lambda _: None)
    return BenchRunner(GpuRunner(decoder, cache, attention, feed, graphs), cache)


def step_of(num_rows: int, num_tokens: int, start: int) -> StepPlan:
    """Rows of so many tokens after `start` that are computed already, in pages of their own; greedy."""
    blocks = -(-(start + num_tokens) // BLOCK_SIZE)
    params = SamplingParams(temperature=0.0)
    return StepPlan(
        tuple(
            ScheduledRow(
                [(row * 7919 + index) % 1000 for index in range(num_tokens)],
                start,
                list(range(row * blocks, (row + 1) * blocks)),
                (SampleTask(params, 0, start + num_tokens, [0], []),),
            )
            for row in range(num_rows)
        )
    )


def hugging_face_config(config: DecoderConfig) -> Any:
    """The same shape for transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        eos_token_id=None,
        bos_token_id=None,
    )
