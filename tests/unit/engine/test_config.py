"""Reading a model folder's configuration, and refusing what is not computed here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.config import ARCHITECTURES, MoeConfig, load_config
from engine.config_deepseek import Gate
from engine.errors import ConfigError
from engine.models import MODELS
from engine.rope import Llama3, Rope, Yarn

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
}

# Llama-3.1-8B's own.
LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

# DeepSeek-V2-Lite's own, but for fields of training.
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
# What DeepSeek-V3's has otherwise.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
}


def write(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """Write config.json; a change to ... removes the field."""
    fields = {name: value for name, value in (config | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_published_dense_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DENSE))
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (28, 16, 8)
    assert (config.head_size, config.rope, config.dtype) == (128, Rope(theta=1e6), "bfloat16")
    assert config.eos_token_ids == (151645,)
    assert config.tie_word_embeddings
    assert config.moe is None


def test_published_moe_config(tmp_path: Path) -> None:
    moe = load_config(write(tmp_path, MOE)).moe
    assert moe == MoeConfig(
        num_experts=128,
        top_k=8,
        intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=(3,),
    )
    assert [moe.is_sparse(layer) for layer in range(6)] == [False, True, False, False, False, True]


def test_published_llama_configs(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LLAMA))
    assert (config.head_size, config.num_kv_heads, config.qk_norm) == (128, 8, False)
    assert config.rope == Rope(theta=5e5, scaling=Llama3(stretch=8, few=1, many=4, trained=8192))
    assert config.max_position_embeddings == 131_072
    # Llama 2's has no base, the first Llama's no number of KV heads.
    old = {"rope_theta": ..., "rope_scaling": None, "num_key_value_heads": ...}
    config = load_config(write(tmp_path, LLAMA, **old))
    assert (config.rope, config.num_kv_heads) == (Rope(theta=1e4), 32)


def test_published_deepseek_configs(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DEEPSEEK))
    latent, moe = config.latent, config.moe
    assert latent is not None
    assert (latent.query_rank, latent.rank, latent.cell_size) == (None, 512, 576)
    assert (config.num_kv_heads, config.head_size, config.kv_planes) == (1, 576, 1)
    # Both roots of the original's factor are in its softmax_scale.
    assert latent.scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    assert config.rope.amplitude == 1
    assert config.max_position_embeddings == 163_840
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.shared_size) == (64, 6, 2816)
    assert [moe.is_sparse(layer) for layer in range(3)] == [False, True, True]
    assert moe.gate is None
    grouped = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    moe = load_config(write(tmp_path, DEEPSEEK | grouped)).moe
    assert moe is not None
    assert moe.gate is not None
    assert (moe.gate.sigmoid, moe.gate.biased, moe.gate.groups) == (False, False, 8)

    config = load_config(write(tmp_path, DEEPSEEK | V3))
    assert config.moe is not None
    assert config.moe.gate == Gate(
        sigmoid=True, biased=True, groups=8, chosen_groups=4, best_of_group=2, scale=2.5
    )
    assert config.latent is not None
    assert (config.latent.query_rank, config.more_layers) == (1536, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; it must be greedy or"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; it must be softmax"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True; it must be false"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; it must be 1"),
        ({"kv_lora_rank": ...}, "kv_lora_rank is missing"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63.*even"),
        (V3 | {"n_group": 7}, "n_group is 7.*n_routed_experts, which is 256"),
        (V3 | {"topk_group": 9}, "topk_group is 9.*n_group, which is 8"),
        (V3 | {"num_experts_per_tok": 200}, "num_experts_per_tok is 200.*chosen groups"),
        (V3 | {"topk_method": "greedy"}, "topk_method is 'greedy'; it must be noaux_tc"),
        (V3 | {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*bfloat16"),
    ],
)
def test_bad_fields_of_deepseek_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, DEEPSEEK, **changes)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


def test_mistral_without_a_window_is_read_and_with_one_refused(tmp_path: Path) -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "rope_scaling": None}
    assert not load_config(write(tmp_path, mistral, sliding_window=None)).qk_norm
    with pytest.raises(ConfigError, match="sliding_window is 4096; it must be null"):
        load_config(write(tmp_path, mistral, sliding_window=4096))


def test_yarn_lengthens_a_context_and_linear_scaling_is_taken_at_its_word(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = load_config(write(tmp_path, DENSE, rope_scaling=yarn))
    assert isinstance(config.rope.scaling, Yarn)
    assert config.max_position_embeddings == 131_072
    linear = {"type": "linear", "factor": 2}
    assert load_config(write(tmp_path, DENSE, rope_scaling=linear)).max_position_embeddings == 40960


def test_names_of_transformers_5_mean_the_same(tmp_path: Path) -> None:
    old = load_config(write(tmp_path, MOE))
    new = load_config(
        write(
            tmp_path,
            MOE,
            num_experts=...,
            num_local_experts=128,
            rope_theta=...,
            rope_scaling=...,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            torch_dtype=...,
            dtype="bfloat16",
        )
    )
    assert new == old


def test_generation_config_names_the_end_tokens_where_it_does(tmp_path: Path) -> None:
    write(tmp_path, DENSE)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_config(tmp_path).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"top_k": 20}')
    assert load_config(tmp_path).eos_token_ids == (151645,)


def test_missing_head_dim_follows_the_architecture(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, DENSE, head_dim=...)).head_size == 128
    assert load_config(write(tmp_path, MOE, head_dim=...)).head_size == 1024 // 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures.*GPT2.*Qwen3ForCausalLM, Qwen3M"),
        ({"architectures": ...}, "architectures is missing"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "1024"}, "hidden_size is '1024'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads, which is 16"),
        ({"head_dim": 33}, "head_dim is 33.*even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_theta": ...}, "rope_theta is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.*dynamic.*yarn"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"rope_scaling\.factor is 0\.5"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, r"\.high_freq_factor.*which is 1\.0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": "x"}}, r"\.rope_theta is 'x'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.*whole head"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'.*object"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*bfloat16"),
        ({"torch_dtype": "float8"}, "torch_dtype is 'float8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"num_experts": ...}, "num_experts is missing"),
        ({"num_experts_per_tok": 200}, "at most num_experts, which is 128"),
    ],
)
def test_bad_fields_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, MOE, **changes)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


def test_missing_or_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such model folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(tmp_path)


def test_every_architecture_that_is_read_has_a_model() -> None:
    assert ARCHITECTURES.keys() == MODELS.keys()
