"""Workers of one cluster that differ: in their weights, which never mix, and in what they know."""

from dataclasses import replace

import pytest

from baton.core.errors import InvalidRequest, Unavailable
from baton.core.features import ANSWERED_TOKENS, KNOWN_FEATURES, needed_features
from baton.core.logits_rules import to_text
from baton.core.sampling import SamplingParams
from baton.engine import async_engine
from tests.services.cluster import Limits, cluster, until
from tests.services.fake_engine import CONFIG_DIGEST, expected
from tests.services.prompts import prompt_of

OTHER_WEIGHTS = Limits(fingerprint=CONFIG_DIGEST + b"of a fine-tuning")


async def test_other_weights_are_let_in_when_the_last_of_the_first_has_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with cluster(decode=OTHER_WEIGHTS, start=False) as running:
        await running.prefill.start()
        await until(lambda: running.links[0].worker is not None)
        await running.decode.start()
        await until(lambda: "it has other weights than the workers that are connected" in caplog.text)
        with pytest.raises(Unavailable, match="No decode server is connected"):
            await running.ask(running.request(prompt_of(5)))
        await running.prefill.stop()
        await until(lambda: running.links[1].worker is not None)
        running.prefill.limits = OTHER_WEIGHTS
        await running.prefill.start()
        await running.connected()
        request = running.request(prompt_of(20))
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


async def test_a_request_goes_where_all_that_it_needs_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(num_decodes=2, start=False) as running:
        old, new = running.decodes
        with monkeypatch.context() as older:
            older.setattr(async_engine, "KNOWN_FEATURES", KNOWN_FEATURES - {"min_p"})
            await old.start()
            await until(lambda: running.links[1].worker is not None)
        await running.prefill.start()
        await until(lambda: running.links[0].worker is not None)
        await running.ask(running.request(prompt_of(5)))
        request = running.request(prompt_of(5), min_p=0.5)
        with pytest.raises(Unavailable, match="older version don't know min_p"):
            await running.ask(request)
        await new.start()
        await running.connected()
        await running.ask(replace(request, request_id="again"))
        assert running.links[1].worker is not None
        await running.all_clean()


def test_what_is_needed_is_what_is_asked_for() -> None:
    assert needed_features(SamplingParams(), is_answered=False) == frozenset()
    asked = SamplingParams(top_k=5, stop_token_ids=(1,))
    assert needed_features(asked, is_answered=True) == {"top_k", "stop_token_ids", ANSWERED_TOKENS}
    assert needed_features(asked, is_answered=True) <= KNOWN_FEATURES


async def test_a_logits_rule_that_no_worker_has_is_the_clients_mistake() -> None:
    async with cluster() as running:
        rules = to_text({"nobodys": {}})
        with pytest.raises(InvalidRequest, match="'nobodys'") as refused:
            await running.ask(running.request(prompt_of(5), logits_rules=rules))
        assert refused.value.param == "logits_rules.nobodys"
        await running.all_clean()
