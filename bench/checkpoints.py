"""Checkpoints of random weights to measure with, as Hugging Face's own code writes them."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch.builtin import MODEL_DIR

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_POSITIONS = 40_960


def write_dense(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    kv_heads: int,
    vocab_size: int = 4096,
    positions: int = 8192,
) -> Path:
    """Write a dense Qwen3 in bf16 with heads of 128, twice as many of them as KV heads."""
    # Slow to import, and not among the packages that a server needs.
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return folder


def write_moe(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    kv_heads: int,
    experts: int,
    vocab_size: int = 4096,
    positions: int = 8192,
) -> Path:
    """Write a Qwen3-MoE in bf16, like `write_dense` but with heads of 64.

    Four experts of half the hidden size are chosen for each token.
    """
    import torch
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        moe_intermediate_size=hidden // 2,
        num_experts=experts,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config.head_dim = 64  # no field of this class, but all that read its files know it
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return folder


def _dense_159m(folder: Path) -> None:
    sizes = {"layers": 8, "hidden": 1024, "kv_heads": 8}
    write_dense(folder, **sizes, vocab_size=32_000, positions=_POSITIONS)


def _moe_124m(folder: Path) -> None:
    sizes = {"layers": 8, "hidden": 512, "kv_heads": 4, "experts": 32}
    write_moe(folder, **sizes, vocab_size=32_000, positions=_POSITIONS)


def _latent_174m(folder: Path) -> None:
    """Write one in the shape of DeepSeek-V2-Lite's layers, but narrower and fewer."""
    import torch
    import transformers

    config = transformers.DeepseekV2Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=256,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        head_dim=64,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV2ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)


def _dense_8b(folder: Path) -> None:
    """Write one in the shape of Llama-3-8B, 16 GB; on a GPU, if there is one, much quicker."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


DENSE, MOE, LATENT, LARGE = "dense", "moe", "latent", "dense, 8B"
_FOLDERS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    DENSE: ("qwen3-159m", _dense_159m),
    MOE: ("qwen3-moe-124m", _moe_124m),
    LATENT: ("deepseek-174m", _latent_174m),
    LARGE: ("llama-3-8b-shaped", _dense_8b),
}


def add_tokenizer(folder: Path, into: Path) -> None:
    """Link a checkpoint's files and the built-in model's tokenizer into a folder, to be served."""
    names = ("tokenizer.json", "tokenizer_config.json")
    for file in (*folder.iterdir(), *(MODEL_DIR / name for name in names)):
        (into / file.name).symlink_to(file.resolve())


def kept_at(cache: Path, name: str) -> Path:
    """Return where in `cache` the checkpoint DENSE, MOE, LATENT or LARGE is or would be."""
    return cache / _FOLDERS[name][0]


def kept(cache: Path, name: str) -> Path:
    """Return a checkpoint's folder (DENSE, MOE and so on); written where `cache` has none yet."""
    folder = kept_at(cache, name)
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when whole: one that was cut short must not be taken for a checkpoint.
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            made = Path(unfinished) / folder.name
            _FOLDERS[name][1](made)
            made.rename(folder)
    return folder
