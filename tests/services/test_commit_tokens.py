"""First tokens that a broken prefill server commits cost nobody but their own request."""

import asyncio
import time

import grpc
import pytest

from baton.v1 import worker_pb2
from tests.services.by_hand import next_event, open_session
from tests.services.cluster import DEADLINE_S, Limits, cluster, until
from tests.services.fake_engine import VOCABULARY_SIZE, expected
from tests.services.prompts import prompt_of
from tests.services.push_bench import Bench


def strict(engine):
    """As embeddings are: "Token ids must be below vocab_size" (ModelRunner.compute)."""
    run = engine.runner.run

    def run_strictly(plan, layers_done=None):
        if any(token >= VOCABULARY_SIZE for row in plan.rows for token in row.token_ids):
            raise IndexError("index out of range in self")
        if len(plan.rows) > 2:
            raise IndexError("a batch of more than max_num_seqs")
        time.sleep(0.002)
        return run(plan, layers_done)

    engine.runner.run = run_strictly
    return engine


@pytest.mark.parametrize(
    "tokens", [(2**31,), (VOCABULARY_SIZE,), (5, 6, 7)], ids=["huge", "one more", "choices"]
)
async def test_first_tokens_that_can_not_be(tokens: tuple[int, ...]) -> None:
    limits = Limits(max_num_seqs=2, on_device=strict)
    async with cluster(decode=limits) as running:
        request = running.request(prompt_of(9, salt=3), max_tokens=400)
        other = asyncio.create_task(running.ask(request))
        async with grpc.aio.insecure_channel(running.decode.address) as channel:
            made = Bench(running.decode, channel, await open_session(channel))
            await until(lambda: running.decode.host.load.num_running)
            await made.reserve()
            await made.push(made.open(), made.pages(0, 3), made.commit(*tokens))
            answer = await asyncio.wait_for(other, DEADLINE_S)
            assert answer.outcomes == expected(request.token_ids, request.sampling)
            failed = (await next_event(made.session, "failed")).failed
            assert failed.reason == worker_pb2.Failed.REASON_TRANSFER
            made.session.cancel()
        await running.all_clean()
