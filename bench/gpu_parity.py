"""Small random models in bfloat16 against the CPU's float32, and engine loops with a step ahead and without.

The reference's own tokens are fed to both, so that one near-tie does not make all that comes after it another
text: what is compared is the likeliest token after each of the same prefixes, and log probabilities of those
that the device finds likeliest.
"""

import dataclasses
import queue
import time
from dataclasses import dataclass

import torch

from baton.core.block_pool import BlockPool
from baton.core.commands import AddRequest, EngineOutput
from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.ports import LayersDone, Runner, SubmittedStep
from baton.core.request import EngineRequest
from baton.core.sampling import SampledToken, SamplingParams
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.loop import EngineLoop
from baton.engine.models.decoder import Decoder, DecoderConfig
from bench.gpu_model import BLOCK_SIZE, LLAMA_8B, MAX_LEN

NUM_STEPS = 64
PROMPT = tuple(range(3, 40))
LOGPROBS = SamplingParams(temperature=0.0, num_logprobs=20)
# Of log probabilities. Rounding to bfloat16 is off by up to 2^-9 of a value, a few dozen times on its way.
TOLERANCE = 0.25
TIMEOUT_S = 60.0

SMALL = dataclasses.replace(  # few tokens and layers: few near-ties
    LLAMA_8B, vocab_size=256, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=8,
    num_kv_heads=2, head_dim=64, windows=(None,) * 2,
)  # fmt: skip
MODELS: dict[str, DecoderConfig] = {
    "plain": SMALL,
    "sliding window": dataclasses.replace(SMALL, windows=(19,) * 2),
    "norms of heads": dataclasses.replace(SMALL, qk_norm=True),
}


def in_float32(decoder: Decoder) -> Decoder:
    """The same weights, on the CPU, in float32, packed; before `decoder` is."""
    reference = Decoder(decoder.config, ParameterPlacement(torch.float32, torch.device("cpu")))
    weights = decoder.checkpoint_tensors()
    for name, tensor in reference.checkpoint_tensors().items():
        tensor.copy_(weights[name].cpu())
    reference.pack()
    return reference


def fed(runner: Runner, tokens: list[int] | None) -> list[SampledToken]:
    """What is likeliest after the prompt and after each of `tokens`; None: after each token that it gives."""
    sampled: list[SampledToken] = []
    table = list(range(-(-(len(PROMPT) + NUM_STEPS) // BLOCK_SIZE)))
    new, start = list(PROMPT), 0
    while len(sampled) < NUM_STEPS:
        end = start + len(new)
        task = SampleTask(LOGPROBS, 0, end, PROMPT, [])
        step = runner.submit(StepPlan((ScheduledRow(new, start, table, (task,)),)))
        sampled.append(step.collect().samples[0][0])
        new, start = [sampled[-1].token_id if tokens is None else tokens[len(sampled) - 1]], end
    return sampled


@dataclass(frozen=True)
class Agreement:
    """Of NUM_STEPS steps."""

    num_equal: int  # likeliest tokens
    worst: float  # difference of log probabilities of the likeliest tokens


def agreement(ours: list[SampledToken], reference: list[SampledToken]) -> Agreement:
    """Differences are taken of the tokens that both name among their likeliest."""
    worst = 0.0
    for our, their in zip(ours, reference, strict=True):
        known = dict(their.top_logprobs)
        differences = [abs(value - known[i]) for i, value in our.top_logprobs if i in known]
        worst = max([worst, *differences])
    pairs = zip(ours, reference, strict=True)
    return Agreement(sum(our.token_id == their.token_id for our, their in pairs), worst)


class OneStepAtATime:
    """A runner that takes no step before the one under way is collected."""

    depth = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> SubmittedStep:
        """See Runner."""
        return self._runner.submit(plan, layers_done)

    def idle(self) -> None:
        """See Runner."""


def tokens_per_s(runner: Runner, num_blocks: int, num_rows: int, num_tokens: int) -> float:
    """Of an engine's loop with so many greedy requests of so many tokens, after all their first tokens."""
    outputs: queue.SimpleQueue[EngineOutput | Exception] = queue.SimpleQueue()
    config = SchedulerConfig(BLOCK_SIZE, MAX_LEN, num_rows, MAX_LEN, LLAMA_8B.vocab_size)
    loop = EngineLoop(Scheduler(config, BlockPool(num_blocks)), runner, outputs.put, outputs.put)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    for index in range(num_rows):
        loop.submit(AddRequest(EngineRequest(str(index), (index, *PROMPT), b"", (), params)))
    loop.start()
    started, count = 0.0, 0
    while count < num_rows * num_tokens:
        output = outputs.get(timeout=TIMEOUT_S)
        if isinstance(output, Exception) or output.failures:
            raise RuntimeError(f"the engine failed: {output}")
        count += len(output.tokens)
        if count == num_rows:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    loop.stop(TIMEOUT_S)
    return num_rows * (num_tokens - 1) / seconds
