import itertools
import json
import math
from pathlib import Path

import pytest

from engine.config import ModelConfig, load_config
from engine.errors import UnsupportedError
from engine.parallel import Layout as EngineLayout
from planner.calibration import hotspot_ratio
from planner.hardware import find_device
from planner.layout import Layout, Role, layouts, refusal
from planner.memory import memory, rank_kv_token_bytes, rank_weight_bytes
from planner.models import find_model, published
from planner.pipeline import utilisation
from planner.read_config import read_config
from planner.shape import ModelShape, devices_needed, weight_bytes
from planner.work import all_reduces

H100 = find_device("h100")


def held(shape: ModelShape, layout: Layout, reserve: float = 0.1) -> float:
    return memory(
        shape, layout, device_bytes=H100.memory_bytes, reserve=reserve, pass_tokens=2048
    ).kv


# ---- figures that guides give


def test_35b_parameters_in_bf16_need_two_devices_of_80_gb() -> None:
    assert weight_bytes(35e9, 16) == 70e9
    assert devices_needed(70e9, 80e9, reserve=0.2) == 2
    assert devices_needed(70e9, H100.memory_bytes, reserve=0.2) == 2


def test_35b_parameters_in_int4_are_18_gb() -> None:
    assert weight_bytes(35e9, 4) == 17.5e9
    assert math.ceil(weight_bytes(35e9, 4) / 1e9) == 18
    assert devices_needed(weight_bytes(35e9, 4), 80e9, reserve=0.2) == 1


def test_llama_3_70b_in_bf16_needs_tp_2_at_least_on_80_gb() -> None:
    shape = published()["llama-3-70b"]
    assert held(shape, Layout(tp=1)) < 0
    assert held(shape, Layout(tp=2)) > 0


def test_a_million_tokens_of_80_layers_and_8_kv_heads() -> None:
    shape = published()["llama-3-70b"]
    assert 1e6 * shape.kv_token_bytes / 2**30 == pytest.approx(305.2, abs=0.05)
    assert 1e6 * rank_kv_token_bytes(shape, Layout(tp=4)) / 2**30 == pytest.approx(76.3, abs=0.05)


def test_tensor_parallel_ranks_add_up_160_times_a_token_in_80_layers() -> None:
    assert all_reduces(80) == 160


@pytest.mark.parametrize(("micro_batches", "percent"), [(1, 25.0), (4, 57.1), (16, 84.2)])
def test_four_stages_are_as_full_as_micro_batches_make_them(
    micro_batches: int, percent: float
) -> None:
    assert 100 * utilisation(4, micro_batches) == pytest.approx(percent, abs=0.05)


def test_hotspot_ratio_is_the_largest_load_over_the_mean() -> None:
    assert hotspot_ratio([48, 19, 17, 16]) == pytest.approx(1.92)


# ---- shapes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-70b", 69.0),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("bloom-176b", 176.2),
        ("opt-13b", 12.85),
        ("opt-66b", 65.7),
        ("opt-175b", 175.0),
    ],
)
def test_published_shapes_have_the_published_parameters(name: str, billions: float) -> None:
    assert published()[name].parameters / 1e9 == pytest.approx(billions, rel=0.003)


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8"},
}
DEEPSEEK_IN_BF16 = DEEPSEEK_V3 | {
    "quantization_config": None,
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 14336,
    "n_layer": 70,
    "num_attention_heads": 112,
    "vocab_size": 250880,
}
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}


def write(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (DEEPSEEK_V3, 671.0),
        (MIXTRAL, 46.7),
        (QWEN3_30B_A3B, 30.5),
        (QWEN3_8B, 8.19),
        (QWEN2_7B, 7.62),
        (BLOOM, 176.2),
    ],
)
def test_parameters_follow_from_the_config_alone(
    config: object, billions: float, tmp_path: Path
) -> None:
    assert read_config(write(tmp_path, config)).parameters / 1e9 == pytest.approx(
        billions, rel=0.005
    )


def test_latent_attention_caches_one_small_vector_a_layer_on_every_tp_rank(tmp_path: Path) -> None:
    shape = read_config(write(tmp_path, DEEPSEEK_V3))
    assert shape.kv_token_bytes == 61 * (512 + 64) * 2
    assert rank_kv_token_bytes(shape, Layout(tp=8)) == shape.kv_token_bytes
    assert shape.weight_bits == 8


def test_a_folder_a_file_and_a_name_are_all_models(tmp_path: Path) -> None:
    path = write(tmp_path / "m", QWEN3_8B)
    assert find_model(str(path.parent)) == find_model(str(path))
    assert find_model(str(path)).name == "m"
    assert find_model(str(path)).runs_here
    assert find_model("Llama-3-8B").runs_here
    assert not find_model("OPT-13B").runs_here


def test_weights_run_here_that_are_wide_enough(tmp_path: Path) -> None:
    path = write(tmp_path, DEEPSEEK_V3)
    assert not read_config(path).runs_here
    assert read_config(path, weight_bits=16).runs_here
    assert read_config(write(tmp_path, DEEPSEEK_IN_BF16)).runs_here
    assert find_model("llama-3-8b", weight_bits=4).weight_bytes == pytest.approx(4.0e9, rel=0.01)


# ---- layouts


@pytest.mark.parametrize("config", [QWEN3_8B, QWEN3_30B_A3B, DEEPSEEK_IN_BF16])
def test_layouts_are_refused_as_the_engine_refuses_them(config: object, tmp_path: Path) -> None:
    path = write(tmp_path, config)
    shape, engine_config = read_config(path), load_config(tmp_path)
    degrees = [1, 2, 3, 4, 8, 64, 256]
    verdicts = set()
    for tp, pp, cp, dp, ep in itertools.product(degrees, degrees, [1, 2], [1, 2, 4], degrees):
        ours = refusal(shape, Layout(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep)) is None
        engines = runs(engine_config, tp=tp, pp=pp, cp=cp, dp=dp, ep=ep)
        assert ours == engines, (tp, pp, cp, dp, ep)
        verdicts.add(ours)
    assert verdicts == {True, False}


def runs(config: ModelConfig, *, tp: int, pp: int, cp: int, dp: int, ep: int) -> bool:
    try:
        EngineLayout(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep).check(config)
    except UnsupportedError:
        return False
    return True


def test_ranks_of_any_layout_hold_the_whole_model_between_them(tmp_path: Path) -> None:
    shape = read_config(write(tmp_path, QWEN3_30B_A3B))
    for layout in layouts(Role.DECODE, 16, sparse=True):
        if refusal(shape, layout) is None:
            assert rank_weight_bytes(shape, layout) * layout.ranks >= shape.weight_bytes * 0.999
    whole = rank_weight_bytes(shape, Layout())
    assert whole == pytest.approx(shape.weight_bytes)
    # All but the experts is on every dp rank.
    split = rank_weight_bytes(shape, Layout(dp=8, ep=8))
    assert whole / 8 < split < whole / 7 + 2 * shape.dense_parameters


def test_reserve_weights_and_activations_leave_the_rest_to_kv() -> None:
    shape = published()["llama-3-8b"]
    part = memory(shape, Layout(), device_bytes=80e9, reserve=0.1, pass_tokens=2048)
    assert part.weights == pytest.approx(shape.weight_bytes)
    assert part.reserve == pytest.approx(8e9)
    assert part.kv == pytest.approx(80e9 - part.weights - 8e9 - part.activations)
    assert part.kv_tokens == int(part.kv / shape.kv_token_bytes)
    assert 0 < part.activations < 1e9
