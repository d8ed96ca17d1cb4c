"""The models' logits against Hugging Face's, on random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels import attention_cpu, experts
from engine.runner import Chunk
from tests.unit.engine.checkpoints import (
    ARCHITECTURES,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    LLAMA,
    QWEN2,
    hugging_face_logits,
    make_checkpoint,
)
from tests.unit.engine.conftest import MakeRunner

DENSE, MOE = ARCHITECTURES
TOKENS = [(7 * i * i + 3 * i) % 100 for i in range(45)]

SHAPES: list[tuple[str, dict[str, Any]]] = [
    (DENSE, {"num_attention_heads": 4, "num_key_value_heads": 4}),
    (DENSE, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    (DENSE, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}),
    (DENSE, {"head_dim": 64, "tie_word_embeddings": True}),
    (DENSE, {"hidden_size": 40, "intermediate_size": 56, "vocab_size": 101, "rope_theta": 1e4}),
    (DENSE, {"rms_norm_eps": 1e-2}),
    (MOE, {"num_key_value_heads": 4, "norm_topk_prob": False}),
    (MOE, {"num_attention_heads": 8, "num_key_value_heads": 1, "num_experts_per_tok": 4}),
    (MOE, {"mlp_only_layers": [1], "tie_word_embeddings": True}),
    (MOE, {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    (MOE, {"num_experts": 20, "num_experts_per_tok": 1, "moe_intermediate_size": 24}),
    (LLAMA, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    (LLAMA, {"head_dim": 24, "tie_word_embeddings": True, "rope_theta": 1e4}),
    ("MistralForCausalLM", {"sliding_window": None}),
    (QWEN2, {"head_dim": 16}),
    (QWEN2, {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    (DEEPSEEK_V2, {}),
    (DEEPSEEK_V2, {"routed_scaling_factor": 1.0}),
    (DEEPSEEK_V2, {"q_lora_rank": None, "n_shared_experts": 1}),
    (DEEPSEEK_V2, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    (DEEPSEEK_V3, {}),
    (DEEPSEEK_V3, {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    (DEEPSEEK_V3, {"first_k_dense_replace": 0, "num_experts_per_tok": 4}),
]
TRAINED = {"original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ROPES: list[tuple[str, dict[str, Any]]] = [
    (LLAMA, {"rope_type": "linear", "factor": 2.5}),
    (LLAMA, LLAMA3 | TRAINED),
    (LLAMA, LLAMA3 | {"original_max_position_embeddings": 1024, "factor": 32.0}),
    (DENSE, YARN | TRAINED),
    (DENSE, YARN | {"original_max_position_embeddings": 64, "truncate": False}),
    (DENSE, YARN | TRAINED | {"beta_fast": 4, "beta_slow": 2, "attention_factor": 0.7}),
    (DENSE, YARN | TRAINED | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    (DEEPSEEK_V2, YARN | TRAINED | {"mscale": 0.707, "mscale_all_dim": 0.707}),
    (DEEPSEEK_V3, YARN | TRAINED | {"mscale": 1.0, "mscale_all_dim": 1.0}),
]


@pytest.mark.parametrize(("architecture", "shape"), SHAPES)
def test_logits_equal_hugging_face_in_fp32(
    architecture: str, shape: dict[str, Any], tmp_path: Path, make_runner: MakeRunner
) -> None:
    folder = make_checkpoint(tmp_path, architecture, **shape)
    runner = make_runner(folder)
    chunk = Chunk(token_ids=TOKENS, start=0, block_table=range(6))
    (logits_TV,) = runner.forward_all([chunk])
    expected_TV = hugging_face_logits(folder, TOKENS)
    assert expected_TV.std() > 1  # flat logits would prove nothing
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "rope"), ROPES)
def test_a_stretched_context_is_hugging_faces(
    architecture: str, rope: dict[str, Any], tmp_path: Path, make_runner: MakeRunner
) -> None:
    folder = make_checkpoint(tmp_path, architecture, rope=rope, rope_theta=1e3)
    chunk = Chunk(token_ids=TOKENS, start=0, block_table=range(6))
    (logits_TV,) = make_runner(folder).forward_all([chunk])
    expected_TV = hugging_face_logits(folder, TOKENS)
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-4, rtol=0)
    plain_TV = hugging_face_logits(make_checkpoint(tmp_path, architecture, rope_theta=1e3), TOKENS)
    assert not torch.allclose(plain_TV, expected_TV, atol=1e-2)


@pytest.mark.parametrize("slice_scores", [attention_cpu._SLICE_SCORES, 20_000, 1])
def test_logits_equal_hugging_face_beyond_one_slice_of_queries(
    checkpoint: Path,
    make_runner: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
    slice_scores: int,
) -> None:
    monkeypatch.setattr(attention_cpu, "_SLICE_SCORES", slice_scores)
    token_ids = (TOKENS * 8)[:300]
    chunk = Chunk(token_ids=token_ids, start=0, block_table=range(40))
    (logits_TV,) = make_runner(checkpoint).forward_all([chunk])
    expected_TV = hugging_face_logits(checkpoint, token_ids)
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", [0, 1 << 30])
@pytest.mark.parametrize("tokens", [1, 45])
def test_experts_that_are_run_together_or_one_by_one_give_the_same(
    tmp_path: Path,
    make_runner: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
    weights: int,
    tokens: int,
) -> None:
    monkeypatch.setattr(experts, "_ALL_EXPERTS_WEIGHTS", weights)
    monkeypatch.setattr(experts, "_ALL_EXPERTS_PAIRS", 1 << 20)
    folder = make_checkpoint(tmp_path, MOE)
    chunk = Chunk(token_ids=TOKENS[:tokens], start=0, block_table=range(6))
    (logits_TV,) = make_runner(folder).forward_all([chunk])
    expected_TV = hugging_face_logits(folder, TOKENS[:tokens])
    torch.testing.assert_close(logits_TV, expected_TV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_hugging_face_is(
    checkpoint: Path, make_runner: MakeRunner, dtype: torch.dtype
) -> None:
    exact_TV = hugging_face_logits(checkpoint, TOKENS)
    theirs = (hugging_face_logits(checkpoint, TOKENS, dtype) - exact_TV).square().mean()
    runner = make_runner(checkpoint, dtype=dtype)
    (logits_TV,) = runner.forward_all([Chunk(token_ids=TOKENS, start=0, block_table=range(6))])
    ours = (logits_TV - exact_TV).square().mean()
    assert ours.sqrt() <= 2 * theirs.sqrt()


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_bfloat16_checkpoints_load_from_one_file_or_many(
    shard_size: str, tmp_path: Path, make_runner: MakeRunner
) -> None:
    folder = make_checkpoint(tmp_path, MOE, dtype=torch.bfloat16, max_shard_size=shard_size)
    assert (folder / "model.safetensors").exists() == (shard_size == "5GB")
    (logits_TV,) = make_runner(folder).forward_all(
        [Chunk(token_ids=TOKENS, start=0, block_table=range(6))]
    )
    torch.testing.assert_close(logits_TV, hugging_face_logits(folder, TOKENS), atol=1e-4, rtol=0)
