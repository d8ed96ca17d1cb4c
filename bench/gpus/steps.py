"""Whole decoding steps on a GPU, beside what its memory allows.

Steps of models in the shapes of published ones, with made-up weights and keys, played from CUDA
graphs and launched kernel by kernel. The limit is what a step must read, the weights that its
tokens go through and their keys and values once each, at the rate of a plain copy in the same run.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.gpus.device import timer_of
from bench.kernel_timing import Timer, copied_bytes_per_s
from bench.report import GrowingReport, Row, median_and_spread
from engine.config import ModelConfig, MoeConfig
from engine.kvcache import KVCache
from engine.parallel import Layout
from engine.rope import Rope
from engine.runner import Chunk, ModelRunner
from engine.weights import WeightSlot

_BLOCK = 32
_SPREAD = 0.02  # of made-up weights, as models are initialised


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model's shape, and the steps of it: sequences, and keys of each."""

    name: str
    config: ModelConfig
    steps: Sequence[tuple[int, int]]


def _config(architecture: str, **shape: object) -> ModelConfig:
    common: Mapping[str, object] = {
        "architecture": architecture,
        "num_kv_heads": 8,
        "head_size": 128,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope": Rope(theta=1e6),
        "qk_norm": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40_960,
        "dtype": "bfloat16",
        "eos_token_ids": (),
    }
    return ModelConfig(**{**common, **shape})  # type: ignore[arg-type]


_STEPS = ((1, 1024), (1, 32_768), (8, 1024), (32, 1024), (32, 4096), (128, 1024))
WORKS = (
    Work(
        name="8B, dense",  # Llama-3-8B's config.json
        config=_config(
            "LlamaForCausalLM",
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            intermediate_size=14_336,
            vocab_size=128_256,
            rope=Rope(theta=5e5),
            qk_norm=False,
        ),
        steps=_STEPS,
    ),
    Work(
        name="30B, 3B active",  # Qwen3-30B-A3B's
        config=_config(
            "Qwen3MoeForCausalLM",
            num_layers=48,
            hidden_size=2048,
            num_heads=32,
            num_kv_heads=4,
            intermediate_size=6144,
            moe=MoeConfig(
                num_experts=128,
                top_k=8,
                intermediate_size=768,
                norm_topk_prob=True,
                decoder_sparse_step=1,
                mlp_only_layers=(),
            ),
        ),
        steps=_STEPS,
    ),
)


class Weights:
    """Makes up weights, and counts what a step reads of them."""

    def __init__(self) -> None:
        self._always = 0
        self._of_experts = 0

    def fill(self, slots: Sequence[WeightSlot]) -> None:
        """Give every slot numbers; norms get ones."""
        for slot in slots:
            if len(slot.shape) == 1:
                slot.target.fill_(1.0)
            else:
                slot.target.normal_(0.0, _SPREAD)
            if ".experts." in slot.name:
                self._of_experts += slot.target.nbytes
            elif not slot.name.endswith("embed_tokens.weight"):  # of which a row a token is read
                self._always += slot.target.nbytes

    def read_bytes(self, config: ModelConfig, tokens: int) -> float:
        """Return what so many tokens read, of experts as many as chance has them choose."""
        if config.moe is None:
            return self._always
        untouched = (1 - config.moe.top_k / config.moe.num_experts) ** tokens
        return self._always + self._of_experts * (1 - untouched)


def measure_work(
    work: Work,
    device: torch.device,
    timer: Timer,
    bytes_per_s: float | None,
    repeats: int,
    figures: GrowingReport,
) -> None:
    """Measure a model's steps: played from graphs on a GPU, and launched one by one."""
    config, weights = work.config, Weights()
    blocks = max(sequences * _blocks(keys) for sequences, keys in work.steps)
    runner = ModelRunner(
        folder=None,
        config=config,
        dtype=torch.bfloat16,
        device=device,
        num_blocks=blocks,
        block_size=_BLOCK,
        fill=weights.fill,
    )
    runner.cache.tensor.normal_()
    launched = {step: timer(_stepping(runner, *step), repeats) for step in work.steps}
    if device.type == "cuda":
        runner.record_steps(*(max(sizes) for sizes in zip(*work.steps, strict=True)))
    kv_bytes = KVCache.block_bytes(config, torch.bfloat16, _BLOCK, Layout()) / _BLOCK
    for step in work.steps:
        sequences, keys = step
        with figures.attempt(_name(work, step)):
            played = launched[step]
            if device.type == "cuda":
                played = timer(_stepping(runner, *step), repeats)
            rate, spread = median_and_spread([sequences / seconds for seconds in played])
            read = weights.read_bytes(config, sequences) + sequences * keys * kv_bytes
            row = Row(
                row=_name(work, step),
                ours=rate,
                unit="tokens/s",
                higher_is_better=True,
                limit=sequences * bytes_per_s / read if bytes_per_s else None,
                peer=sequences / statistics.median(launched[step]),
                peer_name="launched one by one",
                spread=spread,
            )
            figures.put(row)


def _blocks(keys: int) -> int:
    return -(-keys // _BLOCK)


def _stepping(runner: ModelRunner, sequences: int, keys: int) -> Callable[[], object]:
    """Return a step of sequences that each have so many keys, that of the new token among them."""
    each = _blocks(keys)
    chunks = [
        Chunk(token_ids=[i + 1], start=keys - 1, block_table=range(i * each, (i + 1) * each))
        for i in range(sequences)
    ]
    inputs = runner.prepare(chunks)
    token_ids = [i + 1 for i in range(sequences)]
    return lambda: runner.step(inputs, token_ids, lambda: None)


def measure(
    device: torch.device, pattern: str, repeats: int, figures: GrowingReport, *, quick: bool = False
) -> None:
    """Measure the steps whose names match, the first of each model alone where `quick`."""
    timer = timer_of(device)
    bytes_per_s = copied_bytes_per_s(timer, device, repeats) if device.type == "cuda" else None
    for work in WORKS:
        steps = work.steps[:1] if quick else work.steps
        wanted = [step for step in steps if re.search(pattern, _name(work, step))]
        if wanted:
            chosen = Work(name=work.name, config=work.config, steps=wanted)
            with figures.attempt(f"{work.name}, steps"):
                measure_work(chosen, device, timer, bytes_per_s, repeats, figures)


def _name(work: Work, step: tuple[int, int]) -> str:
    return f"{work.name}, step, {step[0]} x {step[1]} keys"
