"""Loading checkpoints: what works, and one line that says what to do where it doesn't."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.engine.factory import load_engine
from baton.engine.weights import resolve_dtype
from baton.fingerprint import model_fingerprint
from baton.model_files import (
    eos_token_ids,
    max_position_embeddings,
    read_config,
    vocab_size,
)
from tests.checkpoints import write_checkpoint
from tests.engine.driver import Driver, Request, make_prompt

OPTIONS = EngineConfig(kv_cache_bytes=2**22)


@pytest.fixture
def model_dir(checkpoint, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def sharded_dir(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama-sharded-linear"), tmp_path / "model")


def refused(model_dir, *words, options=OPTIONS):
    """The checkpoint is refused with one line that has these words."""
    with pytest.raises(StartupError) as caught:
        load_engine(model_dir, options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def edit_config(model_dir, **fields):
    file = model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(model_dir, change):
    tensors = load_file(model_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors")


def test_missing_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "does not exist")


def test_no_config(model_dir):
    (model_dir / "config.json").unlink()
    refused(model_dir, "config.json")


@pytest.mark.parametrize("content", ["{", "[]", "\xff\xfe"])
def test_config_is_not_a_json_object(model_dir, content):
    (model_dir / "config.json").write_text(content, encoding="latin-1")
    refused(model_dir, "config.json", "JSON")


def test_no_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    refused(model_dir, "no *.safetensors files")


def test_missing_shard(sharded_dir):
    shard = sorted(sharded_dir.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded_dir, shard.name, "lacks 1 of")


def test_index_without_map(sharded_dir):
    for content in ("{}", '{"weight_map": {"a": 5}}'):
        (sharded_dir / "model.safetensors.index.json").write_text(content)
        refused(sharded_dir, "weight_map")


def test_missing_tensors(model_dir):
    def drop_layer(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    edit_weights(model_dir, drop_layer)
    refused(model_dir, "lacks 9 of", "model.layers.1.input_layernorm.weight", "...")


def test_wrong_shape(model_dir):
    edit_weights(model_dir, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    refused(model_dir, "model.norm.weight", "[3]", "[64]")


def test_tensor_without_a_place(model_dir):
    edit_weights(model_dir, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    refused(model_dir, "model.layers.0.self_attn.q_proj.bias", "no place")


def test_tensors_that_do_not_matter(model_dir):
    edit_weights(
        model_dir, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    load_engine(model_dir, OPTIONS)


def test_second_copy_of_tied_embeddings(model_dir):
    """A copy of them does not matter; another projection would give other tokens than the checkpoint's."""
    edit_weights(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit_config(model_dir, tie_word_embeddings=True)
    load_engine(model_dir, OPTIONS)
    edit_weights(model_dir, lambda t: t["lm_head.weight"][7].add_(1))
    refused(model_dir, "lm_head.weight", "tie_word_embeddings to false")


@pytest.mark.parametrize("size", [4, 200, 20_000])
def test_truncated_file(model_dir, size):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(model_dir, "model.safetensors", "download it again")


def test_garbage_file(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"\xff" * 500)
    refused(model_dir, "model.safetensors", "download it again")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM")),
        ({"architectures": ["GPT2Model"]}, ("GPT2Model", "LlamaForCausalLM")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification",)),
        ({"architectures": None, "model_type": "gpt2"}, ("none named", "'gpt2'", "Qwen3ForCausalLM")),
        ({"architectures": [], "model_type": None}, ("none named",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantized",)),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"rope_scaling": ["linear"]}, ("rope parameters", "linear")),
        ({"num_key_value_heads": 3}, ("multiple",)),
        ({"hidden_act": "relu6"}, ("relu6", "silu")),
        ({"dtype": "float8_e4m3fn"}, ("float8_e4m3fn", "--dtype")),
        ({"rms_norm_eps": None}, ("rms_norm_eps", "None", "leave it out for 1e-06")),
        ({"rope_parameters": {"rope_theta": None}}, ("rope_theta", "None", "leave it out for 10000")),
        ({"rope_parameters": {"rope_theta": 0}}, ("rope_theta", "0")),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, ("'factor'", "'2'")),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -2.0}}, ("'factor'", "-2.0")),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": None}},
            ("original_max_position_embeddings", "None"),
        ),
        ({"num_key_value_heads": "2"}, ("num_key_value_heads", "'2'")),
        ({"head_dim": 15}, ("15", "head_dim")),
        ({"hidden_act": ["silu"]}, ("['silu']",)),
        ({"quantization_config": "gptq"}, ("quantized", "gptq")),
        ({"max_position_embeddings": 100_000}, ("100000", "--kv-cache-memory", "--max-model-len")),
    ],
)
def test_unusable_config(model_dir, fields, words):
    edit_config(model_dir, **fields)
    refused(model_dir, *words)


def test_unusable_options(model_dir):
    refused(model_dir, "257", options=EngineConfig(kv_cache_bytes=2**22, max_model_len=257))
    refused(model_dir, "--kv-cache-memory", options=EngineConfig(kv_cache_bytes=10))
    refused(
        model_dir, "lower --kv-cache-memory", options=EngineConfig(kv_cache_bytes=2**60)
    )  # more than any machine has
    refused(
        model_dir, "lower --kv-cache-memory", options=EngineConfig(kv_cache_bytes=2**80)
    )  # more than any machine can count


def test_facts(model_dir):
    engine = load_engine(model_dir, EngineConfig(kv_cache_bytes=2**22, max_model_len=100, block_size=8))
    layout = engine.page_store.layout
    assert (engine.max_model_len, engine.eos_token_ids, engine.config.vocab_size) == (100, (1,), 160)
    assert (layout.block_size, layout.num_layers, layout.dtype) == (8, 3, "float32")
    assert (engine.page_store.num_blocks + 1) * layout.bytes_per_block <= 2**22
    assert engine.fingerprint == model_fingerprint(model_dir)


@pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
def test_bfloat16(tmp_path, wanted):
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    engine = load_engine(tmp_path, EngineConfig(kv_cache_bytes=2**22, dtype=wanted))
    assert engine.page_store.layout.dtype == "bfloat16"
    request = Request(make_prompt(20))
    Driver(engine).generate([request], 4)
    assert len(request.output) == 4


def test_resolve_dtype():
    assert resolve_dtype("auto", {}) == torch.float32
    assert resolve_dtype("auto", {"torch_dtype": "float16"}) == torch.float16
    assert resolve_dtype("auto", {"dtype": "bfloat16", "torch_dtype": "float16"}) == torch.bfloat16
    assert resolve_dtype("float16", {"dtype": "bfloat16"}) == torch.float16


def test_progress_bar_only_on_a_terminal(model_dir, capsys, monkeypatch):
    load_engine(model_dir, OPTIONS)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    load_engine(model_dir, OPTIONS)
    assert "Loading weights" in capsys.readouterr().err


def test_vocab_size(model_dir):
    assert vocab_size(read_config(model_dir)) == 160
    for unusable in ({}, {"vocab_size": "many"}):
        with pytest.raises(StartupError, match="vocab_size"):
            vocab_size(unusable)


def test_eos_token_ids(model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert eos_token_ids(model_dir) == (5, 6)
    (model_dir / "generation_config.json").write_text("{}")
    assert eos_token_ids(model_dir) == (1,)
    (model_dir / "generation_config.json").unlink()
    edit_config(model_dir, eos_token_id=None)
    assert eos_token_ids(model_dir) == ()
    edit_config(model_dir, eos_token_id=[-1, 3])
    assert eos_token_ids(model_dir) == (3,)
    edit_config(model_dir, eos_token_id="</s>")
    with pytest.raises(StartupError, match="eos_token_id"):
        eos_token_ids(model_dir)


def test_max_position_embeddings(model_dir):
    config = read_config(model_dir)
    assert max_position_embeddings(config) == 256
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert max_position_embeddings(config | {"rope_scaling": yarn}) == 1024
    with pytest.raises(StartupError, match="max_position_embeddings"):
        max_position_embeddings({})
