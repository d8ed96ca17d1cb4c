"""Works of the benchmarks for GPUs, so small that a CPU is through with them in a moment."""

from dataclasses import replace
from typing import Any

from bench.gpus.steps import Work

_SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 32,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def tiny(work: Work) -> Work:
    """Return a model of the same architecture."""
    moe = work.config.moe and replace(work.config.moe, num_experts=8, intermediate_size=48)
    return replace(work, config=replace(work.config, **_SIZES, moe=moe))
