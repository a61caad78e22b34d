"""Under vLLM's names there is what vLLM's dashboards ask for, of requests that real workers have computed."""

from contextlib import aclosing
from dataclasses import replace

from baton.core.stopping import FinishReason
from baton_router.request_observer import RequestObserver
from baton_router.text_delta import TextDelta
from baton_router.vllm_metrics import VllmNames
from tests.services.cluster import Cluster, cluster
from tests.services.prompts import prompt_of

LABELS = {"model_name": "fake", "engine": "0"}
HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "request_time_per_output_token_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens"),
    *("request_params_n", "request_params_max_tokens"),
)


async def answered(running: Cluster, num_prompt_tokens: int, max_tokens: int) -> None:
    """As the front doors count it."""
    request = replace(running.request(prompt_of(num_prompt_tokens), max_tokens=max_tokens), answer_id="x")
    with RequestObserver(running.metrics, request) as observer:
        async with aclosing(running.backend.generate(request)) as deltas:
            async for delta in deltas:
                text = TextDelta(
                    delta.choice, "", delta.tokens, delta.finish_reason, delta.num_cached_prompt_tokens
                )
                observer.observe(text)


async def test_dashboards_of_vllm_have_data() -> None:
    async with cluster() as running:
        running.metrics.registry.register(VllmNames("fake", running.metrics, running.pool, running.admission))

        def value(name: str, **labels: str) -> float | None:
            return running.metrics.registry.get_sample_value(f"vllm:{name}", {**LABELS, **labels})

        assert value("request_success_total", finished_reason="length") == 0
        for _ in range(2):
            await answered(running, 33, 6)
        for name in HISTOGRAMS:
            assert (value(f"{name}_count") or 0) >= 2, name
            assert value(f"{name}_bucket", le="+Inf") == value(f"{name}_count"), name
        assert value("request_prompt_tokens_sum") == 66
        assert value("request_generation_tokens_sum") == value("request_max_num_generation_tokens_sum") == 12
        assert value("request_params_max_tokens_sum") == 12
        assert value("prompt_tokens_total") == 66
        assert value("generation_tokens_total") == 12
        assert value("request_success_total", finished_reason="length") == 2
        assert value("num_requests_running") == value("num_requests_waiting") == 0
        assert value("kv_cache_usage_perc") == 0
        assert value("prefix_cache_queries_total") == 66
        assert value("prefix_cache_hits_total") == 32
        assert value("num_preemptions_total") == 0
        own = running.metrics.registry.get_sample_value("baton_request_prompt_tokens_sum")
        assert own == value("request_prompt_tokens_sum")


async def test_what_does_not_end_by_itself_is_aborted() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(5), max_tokens=9, n=2)
        with RequestObserver(running.metrics, request) as observer:
            observer.observe(TextDelta(1, "", (), FinishReason.STOP))

        def ended(reason: str) -> float | None:
            labels = {"finished_reason": reason}
            return running.metrics.registry.get_sample_value("baton_finished_choices_total", labels)

        assert (ended("stop"), ended("abort"), ended("length")) == (1, 1, 0)
        duration = running.metrics.registry.get_sample_value("baton_request_duration_seconds_count")
        assert duration == 0
