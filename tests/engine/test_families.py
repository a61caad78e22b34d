"""Configuration files, old and new, with keys left out, mean what they mean in transformers."""

import pytest

from baton.core.errors import StartupError
from baton.engine.models.registry import decoder_config
from tests.checkpoints import CONFIGS, SMALL

OLD_FILE = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_defaults_of_keys_left_out(architecture):
    sizes = OLD_FILE | {"hidden_size": 256, "num_attention_heads": 32}
    ours = decoder_config(sizes | {"architectures": [architecture]})
    theirs = CONFIGS[architecture](**sizes)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == head_dim
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    window = theirs.sliding_window if architecture == "MistralForCausalLM" else None
    assert ours.windows == (window,) * 3


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows(architecture):
    file = SMALL | {"architectures": [architecture]}
    assert decoder_config(file | SLIDING).windows == (None, 8, 8)
    assert decoder_config(file | SLIDING | {"use_sliding_window": False}).windows == (None,) * 3
    kinds = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    assert decoder_config(file | SLIDING | kinds).windows == (8, None, None)


@pytest.mark.parametrize("window", [0, -1, "8", True])
@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM"])
def test_windows_of_no_tokens_are_refused(architecture, window):
    file = SMALL | SLIDING | {"architectures": [architecture], "sliding_window": window}
    with pytest.raises(StartupError, match="sliding_window"):
        decoder_config(file)


def test_first_layer_with_a_window_must_be_a_number():
    file = SMALL | SLIDING | {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": None}
    with pytest.raises(StartupError, match="max_window_layers"):
        decoder_config(file)


def test_layer_types_of_another_length_are_refused():
    file = SMALL | SLIDING | {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}
    with pytest.raises(StartupError, match="layer_types"):
        decoder_config(file)


def test_layer_types_that_are_not_known_are_refused():
    kinds = {"layer_types": ["full_attention", "chunked_attention", "linear_attention"]}
    with pytest.raises(StartupError, match="chunked_attention, linear_attention"):
        decoder_config(SMALL | SLIDING | kinds | {"architectures": ["Qwen3ForCausalLM"]})
