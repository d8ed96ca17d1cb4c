"""Checkpoints of random weights to measure with, as Hugging Face's own code writes them."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def write_dense(folder: Path, *, layers: int, hidden: int, kv_heads: int) -> Path:
    """Write a dense Qwen3 in bf16 with heads of 128, twice as many of them as KV heads."""
    # Slow to import, and not among the packages that a server needs.
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return folder
