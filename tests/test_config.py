"""Reading the three kinds of config, and refusing what no kernel computes."""

from __future__ import annotations

from typing import Any

import pytest

from edgemistral.config import ModelConfig
from edgemistral.errors import BadConfig

# The config.json of Mistral-7B-Instruct-v0.2.
HF_V2: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
    "vocab_size": 32000,
}
# The params.json of the same model.
MISTRAL_V2: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32000, "rope_theta": 1000000.0,
}
V2 = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000, context=32768,
    norm_eps=1e-5, rope_theta=1e6, sliding_window=None, bos_id=1, eos_id=2,
)


def test_the_real_files_describe_the_same_model() -> None:
    assert ModelConfig.from_hf(HF_V2) == ModelConfig.from_mistral(MISTRAL_V2, 1, 2) == V2


def test_a_blob_config_round_trips() -> None:
    assert ModelConfig.from_dict(V2.to_dict()) == V2


def test_transformers_5_keeps_theta_under_rope_parameters() -> None:
    fields = {**HF_V2, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert ModelConfig.from_hf(fields) == V2
    del fields["rope_theta"]
    assert ModelConfig.from_hf(fields) == V2


def test_what_transformers_writes_can_be_read() -> None:
    transformers = pytest.importorskip("transformers")
    ours = ModelConfig.from_hf(transformers.MistralConfig(architectures=["MistralForCausalLM"]).to_dict())
    assert (ours.rope_theta, ours.sliding_window, ours.head_dim) == (10000.0, 4096, 128)


def test_head_dim_is_taken_or_derived() -> None:
    assert ModelConfig.from_hf({**HF_V2, "head_dim": 64}).head_dim == 64
    assert ModelConfig.from_hf({**HF_V2, "head_dim": None}).head_dim == 128


@pytest.mark.parametrize("window", [4096, "4096"])
def test_sliding_window_of_params_json_may_be_a_string(window: object) -> None:
    assert ModelConfig.from_mistral({**MISTRAL_V2, "sliding_window": window}, 1, 2).sliding_window == 4096


def test_context_of_params_json() -> None:
    assert ModelConfig.from_mistral({**MISTRAL_V2, "max_seq_len": 4096}, 1, 2).context == 4096
    assert ModelConfig.from_mistral({**MISTRAL_V2, "max_position_embeddings": 8192}, 1, 2).context == 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given twice"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers missing"),
        ({"num_key_value_heads": 5}, "n_kv_heads"),
        ({"num_attention_heads": 0}, "head_dim is missing"),
        ({"hidden_size": "4096"}, "head_dim is missing"),
        ({"hidden_size": 4095, "head_dim": 128}, "dim is 4095"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rms_norm_eps": True}, "norm_eps"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"eos_token_id": [2, 32000]}, "eos_id"),
        ({"eos_token_id": 32000}, "eos_id"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
    ],
)
def test_hf_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        ModelConfig.from_hf({**HF_V2, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8}}, "moe"),
        ({"yarn": {"factor": 16}}, "yarn"),
        ({"model_type": "mamba"}, "model_type"),
        ({"activation": "gelu"}, "activation"),
        ({"rope_theta": None}, "rope_theta is missing; add it"),
        ({"head_dim": None}, "head_dim missing"),
        ({"sliding_window": [4096, None]}, "sliding_window"),
    ],
)
def test_params_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        ModelConfig.from_mistral({**MISTRAL_V2, **change}, 1, 2)


def test_blob_configs_that_are_refused() -> None:
    fields = V2.to_dict()
    with pytest.raises(BadConfig, match="lacks rope_theta"):
        ModelConfig.from_dict({name: value for name, value in fields.items() if name != "rope_theta"})
    with pytest.raises(BadConfig, match="unknown fields: color"):
        ModelConfig.from_dict({**fields, "color": 1})
