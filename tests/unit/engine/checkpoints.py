"""Makes small checkpoints with random weights, as Hugging Face's own code writes them."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
LLAMA, QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"
DEEPSEEK_V2, DEEPSEEK_V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"

_SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "rope_theta": 1e6,
}
_MOE_SHAPE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}

# The first of three layers is dense.
_DEEPSEEK_SHAPE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 40,
    "q_lora_rank": 56,
    "head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
_MORE: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": _MOE_SHAPE,
    DEEPSEEK_V2: _DEEPSEEK_SHAPE | {"topk_method": "greedy", "norm_topk_prob": False},
    DEEPSEEK_V3: _DEEPSEEK_SHAPE | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True},
}


def make_checkpoint(
    folder: Path,
    architecture: str = "Qwen3MoeForCausalLM",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **shape: Any,
) -> Path:
    """Write a checkpoint of random weights to `folder` and return it.

    `shape` are fields of Hugging Face's config, over small defaults; `rope` are those of its
    rope_parameters. Weights are drawn so that every part of the model matters and logits are far
    from flat.
    """
    fields = _SHAPE | _MORE.get(architecture, {}) | shape
    scaling = fields.pop("rope", {"rope_type": "default"})
    fields["rope_parameters"] = scaling | {"rope_theta": fields.pop("rope_theta")}
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    model = getattr(transformers, architecture)(config_class(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                gain = 3.0 if name.endswith(("lm_head.weight", "embed_tokens.weight")) else 1.0
                parameter.copy_(gain * noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def hugging_face_logits(
    folder: Path, token_ids: list[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the reference's logits after each of the tokens, [T, V], in fp32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float()
