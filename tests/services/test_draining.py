"""Workers that were told to stop, and the requests of the others."""

import asyncio

from tests.services.cluster import DEADLINE_S, Limits, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of


async def test_a_prompt_whose_prefill_server_drains_before_it_gets_there_goes_to_another() -> None:
    """A request that waits for pages on decode is placed on a prefill server that does not know it yet."""
    async with cluster(decode=Limits(num_blocks=24, max_model_len=90), num_prefills=2) as running:
        first = running.request(prompt_of(60), max_tokens=20)
        running.decode.hold()
        answer = asyncio.create_task(running.ask(first))
        await running.decode.is_held()  # it decodes, on most of the pages
        second = running.request(prompt_of(60, salt=1))
        late_answer = asyncio.create_task(running.ask(second))
        await until(lambda: len(running.decode.service._handover._num_tokens) == 1)
        placed = running.links[1]  # the first request counts on the other until decode has begun
        assert placed.worker is not None
        assert placed.worker.num_in_flight_tokens == 60
        assert await running.prefills[1].sessions.drain(5)  # nothing runs there
        await until(lambda: placed.is_draining)
        running.decode.let_go()
        assert (await answer).outcomes == expected(first.token_ids, first.sampling)
        assert (await late_answer).outcomes == expected(second.token_ids, second.sampling)
        await running.all_clean()


async def test_a_draining_decode_server_keeps_nobody_from_the_places_of_another() -> None:
    async with cluster(decode=Limits(max_num_seqs=2), num_decodes=2) as running:
        answers = [
            asyncio.create_task(running.ask(running.request(prompt_of(9, salt), max_tokens=400)))
            for salt in range(4)
        ]
        for worker in running.decodes:
            worker.hold()
        decode_links = running.links[1:]
        await until(lambda: all(link.worker and link.worker.num_in_flight == 2 for link in decode_links))
        draining = asyncio.create_task(running.decodes[0].sessions.drain(DEADLINE_S))
        await until(lambda: decode_links[0].is_draining)
        running.decodes[1].let_go()  # its two requests end, the draining one's go on
        await until(lambda: sum(answer.done() for answer in answers) == 2)
        await asyncio.wait_for(running.ask(running.request(prompt_of(9, 7))), DEADLINE_S)
        running.decodes[0].let_go()
        await asyncio.gather(*answers, draining)
        await running.all_clean()
