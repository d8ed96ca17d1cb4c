"""Whole systems and vLLM as sides, each on the cores it is given; for whoever takes it to open.

Owns what a peer must be told to have the cores, and else its own defaults.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.sides.process import Side
from service.threads import thread_env

_VLLM_SIDE = Path(__file__).with_name("vllm_side.py")
_VLLM_SERVED_SIDE = Path(__file__).with_name("vllm_served_side.py")


def settings(cores: Sequence[int]) -> dict[str, str]:
    """Return the variables of a peer that has these cores."""
    return {"OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1"}


def served() -> Side:
    """Return our whole system and its client, which computes nothing: see `served_side`."""
    return Side("served", [sys.executable, "-m", "bench.sides.served_side"], thread_env(1))


def vllm(python: Path, cores: Sequence[int], kv_gib: int) -> Side:
    """Return vLLM's offline engine: see `vllm_side`."""
    return Side("vLLM", [str(python), str(_VLLM_SIDE)], vllm_settings(cores, kv_gib))


def vllm_served(python: Path, cores: Sequence[int], kv_gib: int) -> Side:
    """Return vLLM's server and its client: see `vllm_served_side`."""
    return Side("vLLM served", [str(python), str(_VLLM_SERVED_SIDE)], vllm_settings(cores, kv_gib))


def vllm_settings(cores: Sequence[int], kv_gib: int) -> dict[str, str]:
    """Return the variables of vLLM: these cores, and all in one process."""
    return {
        **settings(cores),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
