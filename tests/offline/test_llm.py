"""LLM and AsyncLLM: the engine's own tokens and the API's own text, without a server."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton import LLM, AsyncLLM, RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from baton.config import EngineConfig
from baton.core.errors import InvalidRequest, RequestFailed, StartupError
from baton.core.sampling import SamplingParams as EngineSampling
from baton.tokenizer.backend import read_tokenizer
from tests.colocated import ColocatedEngine
from tests.e2e.processes import DEMO_MODEL

PROMPTS = [list(range(20 + index, 40 + 3 * index)) for index in range(20)]
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 16 << 20, "max_num_seqs": 4}
TIMEOUT_S = 60.0

pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(DEMO_MODEL), **OPTIONS) as made:
        yield made


def test_tokens_are_the_engines(llm: LLM) -> None:
    """Of more prompts than run at once, in their order."""
    engine = ColocatedEngine(DEMO_MODEL, EngineConfig(**OPTIONS))
    expected = engine.token_ids(PROMPTS, EngineSampling(temperature=0.0, max_tokens=12))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert all(output.finished and output.prompt is None for output in outputs)
    text = read_tokenizer(DEMO_MODEL).backend.decode(expected[3], skip_special_tokens=True)
    assert outputs[3].outputs[0].text == text
    assert outputs[3].outputs[0].finish_reason == "length"


def test_what_prompts_may_be(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    [of_text] = llm.generate("Hello there", params)
    token_ids = of_text.prompt_token_ids
    forms: list[Any] = [
        ["Hello there"],
        {"prompt": "Hello there"},
        token_ids,
        [token_ids],
        {"prompt_token_ids": token_ids},
    ]
    for form in forms:
        [output] = llm.generate(form, params, use_tqdm=False)
        assert (output.prompt_token_ids, output.outputs) == (token_ids, of_text.outputs)
    assert of_text.prompt == "Hello there"
    assert llm.generate([], params) == []


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 5)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]
    with pytest.raises(ValueError, match="2 sampling params for 1 prompts"):
        llm.generate(["a"], params)


def test_choices_logprobs_and_stop_strings(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=30, logprobs=2, stop=["e"], ignore_eos=True)
    [output] = llm.generate("The", params, use_tqdm=False)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert "e" not in choice.text
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids)
        chosen = [found[token] for found, token in zip(choice.logprobs, choice.token_ids, strict=True)]
        assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
        assert all(len(found) in (2, 3) for found in choice.logprobs)
        assert {found.rank for found in choice.logprobs[0].values()} >= {1, 2}
    assert llm.generate("The", params, use_tqdm=False)[0].outputs == output.outputs


def test_chat_is_the_models_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    params = SamplingParams(temperature=0.0, max_tokens=6)
    [single] = llm.chat(conversation, params, use_tqdm=False)
    both = llm.chat(
        [conversation, [*conversation, {"role": "assistant", "content": "x"}]], params, use_tqdm=False
    )
    assert single.prompt is not None
    assert "<|user|>" in single.prompt
    assert [both[0].prompt, both[0].outputs] == [single.prompt, single.outputs]
    [open_end] = llm.chat(conversation, params, use_tqdm=False, add_generation_prompt=False)
    assert open_end.prompt != single.prompt


def test_a_chat_has_tools(llm: LLM) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    template = "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ messages[0].content }}"
    settings: dict[str, Any] = {"use_tqdm": False, "chat_template": template}
    conversation = [{"role": "user", "content": "Hi"}]
    params = SamplingParams(max_tokens=1)
    assert llm.chat(conversation, params, **settings, tools=[tool])[0].prompt == "weather;Hi"
    assert llm.chat(conversation, params, **settings)[0].prompt == "Hi"
    with pytest.raises(InvalidRequest, match="tools"):
        llm.chat(conversation, params, **settings, tools=[{"type": "web_search"}])


def test_the_prefix_cache_may_be_reset(llm: LLM) -> None:
    prompt, params = [list(range(100, 180))], SamplingParams(max_tokens=1)
    cached = [llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    llm.reset_prefix_cache()
    assert [*cached, llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens] == [0, 64, 0]


def test_structured_outputs(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    params = SamplingParams(
        seed=1,
        max_tokens=90,
        structured_outputs=StructuredOutputsParams(json={**schema, "additionalProperties": False}),
    )
    [output] = llm.generate("x", params, use_tqdm=False)
    assert type(json.loads(output.outputs[0].text)["ok"]) is bool
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert llm.generate("x", params, use_tqdm=False)[0].outputs[0].text in ("yes", "no")


def test_a_seed_makes_runs_repeatable() -> None:
    def texts(seed: int) -> list[str]:
        with LLM(str(DEMO_MODEL), seed=seed, **OPTIONS) as made:
            outputs = made.generate(["a", "a", "a"], SamplingParams(max_tokens=12), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    first = texts(1)
    assert first == texts(1)
    assert len({*first, *texts(2)}) > 1


def test_errors_come_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate(["x", "y"], [SamplingParams(), SamplingParams(temperature=-1.0)])
    with pytest.raises(InvalidRequest, match="token id 99999"):
        llm.generate([[5, 99999]])
    with pytest.raises(InvalidRequest, match="JSON schema"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "text"})))
    with pytest.raises(InvalidRequest, match="stop"):
        llm.generate("x", SamplingParams(stop=["a"] * 100))
    with pytest.raises(InvalidRequest, match="whole numbers"):
        llm.generate([["a", "b"]])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="A prompt is"):
        llm.generate([{"text": "x"}])
    with pytest.raises(TypeError, match="5"):
        llm.generate(5)  # type: ignore[arg-type]
    for wrong in ({"temperature": "hot"}, {"temprature": 1.0}, {"n": 1.5}, {"stop": 5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingParams(**wrong)
    with pytest.raises(TypeError, match="max_num_seqs"):
        LLM(max_seqs=4)
    with pytest.raises(TypeError, match="tensor_parallel_size=2"):
        LLM(tensor_parallel_size=2)
    with pytest.raises(StartupError, match="nowhere"):
        LLM("./nowhere")
    assert llm.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)[0].finished


async def test_it_works_beside_an_event_loop(llm: LLM) -> None:
    """As in a notebook, whose loop runs while a cell does."""
    assert llm.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)[0].finished


def test_closed_it_says_so() -> None:
    llm = LLM(str(DEMO_MODEL), **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(RequestFailed, match="closed"):
        llm.generate("x")


async def test_the_async_one_streams_and_ends_early() -> None:
    llm = AsyncLLM(str(DEMO_MODEL), **OPTIONS)
    try:
        lengths = []
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        async for output in llm.generate("Hello", params):
            lengths.append(len(output.outputs[0].token_ids))
        assert lengths == list(range(1, 9))
        conversation = [{"role": "user", "content": "Hi"}]
        async for output in llm.chat(conversation, SamplingParams(max_tokens=3000, ignore_eos=True), "mine"):
            assert output.request_id == "mine"
            break
        async with asyncio.timeout(TIMEOUT_S):
            while llm._engine.load.num_running or llm._engine.load.num_waiting:
                async for _ in llm.generate("x", SamplingParams(max_tokens=1)):
                    pass
        both = await asyncio.gather(*(_text(llm, prompt, "same") for prompt in ("a", "b")))
        assert both == [await _text(llm, "a"), await _text(llm, "b")]
    finally:
        await llm.close()


async def test_what_runs_ends_with_the_engine() -> None:
    """Closed or crashed, nobody waits for ever."""
    for end, reason in ((_close, "closed"), (_crash, "engine has stopped")):
        llm = AsyncLLM(str(DEMO_MODEL), **OPTIONS)
        running = llm.generate("Hello", SamplingParams(max_tokens=3000, ignore_eos=True))
        await anext(running)
        await end(llm)
        with pytest.raises(RequestFailed, match=reason):
            async for _ in running:
                pass
        with pytest.raises(RequestFailed, match=reason):
            await _text(llm, "later")
        await llm.close()


async def _close(llm: AsyncLLM) -> None:
    await llm.close()


async def _crash(llm: AsyncLLM) -> None:
    llm._engine._engine._scheduler = None  # type: ignore[assignment]


async def _text(llm: AsyncLLM, prompt: str, request_id: str | None = None) -> str:
    text = ""
    async for output in llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=9), request_id):
        text = output.outputs[0].text
    return text


def test_how_prompts_are_made_and_cut(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"}]
    template = "{{ mood }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    [output] = llm.chat(
        conversation,
        SamplingParams(max_tokens=1),
        use_tqdm=False,
        add_generation_prompt=False,
        continue_final_message=True,
        chat_template=template,
        chat_template_kwargs={"mood": "!"},
    )
    assert output.prompt == "![Hi][Once upon"
    sides = [
        SamplingParams(max_tokens=1, truncate_prompt_tokens=3, truncation_side=s) for s in ("left", "right")
    ]
    last, first = llm.generate([[5, 6, 7, 8, 9]] * 2, sides, use_tqdm=False)
    assert (last.prompt_token_ids, first.prompt_token_ids) == ([7, 8, 9], [5, 6, 7])


def test_how_answers_end() -> None:
    repeating = {"logit_bias": {65: 100.0}, "ignore_eos": True, "max_tokens": 20, "temperature": 0.0}
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=4)
    with LLM(str(DEMO_MODEL), **OPTIONS) as llm:
        params = [
            SamplingParams(**repeating, repetition_detection=detection),
            SamplingParams(**repeating, stop_token_ids=[65], include_stop_str_in_output=True),
            SamplingParams(**repeating),
        ]
        ends = [output.outputs[0] for output in llm.generate(["x"] * 3, params, use_tqdm=False)]
    assert [(end.finish_reason, end.stop_reason) for end in ends] == [
        ("repetition", "repetition_detected"),
        ("stop", 65),
        ("length", None),
    ]
    assert ends[0].token_ids == [65] * 4
    assert ends[1].text * 4 == ends[0].text != ""


def test_settings_that_the_model_recommends(tmp_path: Path) -> None:
    """They hold for calls without settings; those that a program gives are complete."""
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    (model / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 1, "max_new_tokens": 3}')
    with LLM(str(model), **OPTIONS, override_generation_config={"temperature": 0.5}) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 1, 3)
        [default] = llm.generate("Hello", use_tqdm=False)
        [own] = llm.generate("Hello", SamplingParams(ignore_eos=True), use_tqdm=False)
        assert len(default.outputs[0].token_ids) <= 3
        assert len(own.outputs[0].token_ids) == 16
    with LLM(str(model), **OPTIONS, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


SCRIPT = """
from baton import LLM, SamplingParams
params = SamplingParams(max_tokens=3, ignore_eos=True)
outputs = LLM(max_num_seqs=2, kv_cache_bytes=1 << 24).generate(["a", "b"], params)
print([len(output.outputs[0].token_ids) for output in outputs])
"""


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    """It ends by itself, too, though nobody closed the LLM; its progress is not among its output."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    assert done.stdout == "[3, 3]\n"
    assert "2/2" in done.stderr


def test_importing_baton_is_cheap() -> None:
    heavy = ("torch", "tokenizers", "grpc", "asyncio", "pydantic")
    program = f"import sys, baton; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
