"""Every answer that ends by itself is what its schema describes: 200 schemas, greedy and sampled."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from baton.config import EngineConfig
from baton.core.sampling import SamplingParams
from baton.grammars import formats
from baton.tokenizer.backend import read_tokenizer
from tests.checkpoints import write_checkpoint
from tests.colocated import ColocatedEngine
from tests.e2e.processes import DEMO_MODEL
from tests.grammars.schemas_of_people import SCHEMAS

CONFIG = EngineConfig(dtype="float32", kv_cache_bytes=64 << 20, max_num_batched_tokens=512, max_num_seqs=64)
PROMPT = list(range(40, 80))
MAX_TOKENS = 300
NUM_BLOCKS = 120  # of 16 tokens: what runs is preempted often
END = 1


@pytest.fixture(scope="module", params=["shipped", "random"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ColocatedEngine:
    directory = DEMO_MODEL
    if request.param == "random":
        directory = write_checkpoint(
            tmp_path_factory.mktemp("random"), vocab_size=4096, max_position_embeddings=512
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / name, directory / name)
    return ColocatedEngine(Path(directory), CONFIG, num_blocks=NUM_BLOCKS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers(engine: ColocatedEngine, temperature: float) -> None:
    requests = [
        (
            PROMPT,
            SamplingParams(
                temperature=temperature,
                seed=index,
                max_tokens=MAX_TOKENS,
                stop_token_ids=(END,),
                grammar=formats.to_text(formats.json_schema(schema)),
            ),
        )
        for index, schema in enumerate(SCHEMAS)
    ]
    answers = engine.generate_each(requests)
    assert engine.scheduler.num_preemptions > 0
    backend = read_tokenizer(DEMO_MODEL).backend
    num_ended = 0
    for schema, [tokens] in zip(SCHEMAS, answers, strict=True):
        token_ids = [token.token_id for token in tokens]
        if token_ids[-1] != END:
            assert len(token_ids) == MAX_TOKENS
            continue
        num_ended += 1
        text = backend.decode(token_ids[:-1], skip_special_tokens=False)
        jsonschema.validate(json.loads(text), schema)
    assert num_ended > len(SCHEMAS) * 0.8
