"""Reading the three kinds of config, and refusing what no kernel computes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edgemistral.config import ModelConfig, rope_frequencies
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


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Llama-3.1-8B-Instruct's config.json in what matters.
LLAMA = {
    **HF_V2, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "pretraining_tp": 1, "rope_theta": 500000.0, "rope_scaling": LLAMA3,
}


def test_a_llama_without_scaling_is_a_mistral() -> None:
    fields = {**LLAMA, "rope_theta": 1e6, "rope_scaling": None}
    assert ModelConfig.from_hf(fields) == V2
    assert ModelConfig.from_hf({**fields, "sliding_window": 4096}) == V2   # which transformers' Llama does not have either


def test_the_first_llamas_leave_out_theta_and_key_value_heads() -> None:
    missing = {"rope_theta": None, "num_key_value_heads": None, "rope_scaling": None}
    config = ModelConfig.from_hf({**LLAMA, **missing})
    assert (config.rope_theta, config.n_kv_heads) == (10000.0, 32)


@pytest.mark.parametrize(
    "scaling",
    [
        None, LLAMA3, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 4096},
        {"rope_type": "linear", "factor": 2.5}, {"type": "linear", "factor": 4},
    ],
)
@pytest.mark.parametrize("of_transformers_5", [False, True])
def test_rotary_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None, of_transformers_5: bool) -> None:
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    fields = {**LLAMA, "rope_scaling": scaling}
    if of_transformers_5:
        del fields["rope_theta"], fields["rope_scaling"]
        fields["rope_parameters"] = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    theirs = transformers.LlamaConfig(**{**LLAMA, "rope_scaling": scaling})
    ours = ModelConfig.from_hf(fields)
    if scaling is None:
        wanted = 500000.0 ** (-np.arange(0, 128, 2) / 128)
        assert ours.rope_factors is None
    else:
        kind = scaling.get("rope_type", scaling.get("type"))
        wanted = rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")[0].numpy()
    np.testing.assert_allclose(rope_frequencies(ours), wanted, rtol=1e-6)
    assert ModelConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; supported: models without biases"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.*LlamaForSequenceClassification"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type is 'llama', architectures"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "'llama3' has factor 'None'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0, not below"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "'linear' has factor '-1'"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "'linear' has factor 'None'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "supported: unscaled rotary positions and linear"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "contradict"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_llama_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


def test_blobs_made_before_rotary_scaling_are_read() -> None:
    fields = V2.to_dict()
    assert "rope_factors" not in fields
    assert ModelConfig.from_dict(fields) == ModelConfig.from_dict({**fields, "rope_factors": None}) == V2


@pytest.mark.parametrize("factors", [[1.0] * 63, [0.0] * 64, ["1"] * 64, 1.0, [float("inf")] * 64])
def test_rotary_factors_that_are_refused(factors: object) -> None:
    with pytest.raises(BadConfig, match="rope_factors is"):
        ModelConfig.from_dict({**V2.to_dict(), "rope_factors": factors})


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
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
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
