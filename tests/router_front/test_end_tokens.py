"""Which tokens end an answer: those that the model's files name, wherever they name them."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.config import RouterConfig
from baton_router.main import _served_model
from baton_router.requests.admission import Admission
from baton_router.workers.pool import WorkerPool
from tests.router_front.conftest import write_model


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, ["8", "9"]),
        ({"eos_token_id": 7}, {}, ["7"]),
        ({}, {}, ["<|im_end|>"]),  # as the tokenizer's files say
        ({"eos_token_id": None}, {"eos_token_id": None}, ["<|im_end|>"]),
    ],
)
def test_end_tokens(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], expected: list[str]
) -> None:
    write_model(tmp_path)
    sizes = {"vocab_size": 400, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    settings = RouterConfig(tmp_path, ("tiny",), ("unix:/p",), ("unix:/d",))
    pool = WorkerPool(settings, b"")
    served = _served_model(settings, pool, Admission(1, lambda: 1))
    names = {token_id: str(token_id) for token_id in (7, 8, 9)}
    assert [
        names.get(token) or served.tokenizer.token_name(token) for token in served.eos_token_ids
    ] == expected
